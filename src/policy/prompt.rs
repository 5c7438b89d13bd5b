//! Text to tokens and back: the tokenizer, the chat template, and whole characters out of byte pieces.

use std::{
    fs, io,
    path::Path,
    sync::{Arc, OnceLock},
};

use candle_core::quantized::{gguf_file::Content, tokenizer::TokenizerFromGguf};
use chrono::{DateTime, format::StrftimeItems};
use minijinja::{Environment, ErrorKind, Value, context, value::Kwargs};
use serde::Serialize;
use tokenizers::{
    Tokenizer,
    pre_tokenizers::{PreTokenizerWrapper, byte_level::ByteLevel, digits::Digits, sequence::Sequence},
};

use crate::completion::{Message, Timestamp};

use super::Error;

/// A model's tokenizer with its chat template.
#[derive(Debug)]
pub struct Vocabulary {
    tokenizer: Tokenizer,
    /// Each token's own bytes; empty for special tokens.
    pieces: Vec<Vec<u8>>,
    /// The special tokens' texts.
    special: Vec<String>,
    template: Environment<'static>,
    /// What `strftime_now` asks for the time, once somebody has said.
    clock: Arc<OnceLock<fn() -> Timestamp>>,
    /// Texts of the special tokens that templates may name.
    bos: String,
    eos: String,
}

/// Parts a special token that somebody spelled out, until the tokenizer has read it as text. Unicode keeps this
/// character free for such uses: no text has it.
const PART: char = '\u{fdd0}';

/// ChatML, for models that bring no template.
pub(super) const CHATML: &str = "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n\
                      {% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}";

impl Vocabulary {
    /// The tokenizer and template within a GGUF file.
    pub(crate) fn from_gguf(content: &Content) -> Result<Self, Error> {
        let text = |key: &str| content.metadata.get(key).and_then(|value| value.to_string().ok().cloned());
        let mut tokenizer = Tokenizer::from_gguf(content)?;
        let pre = text("tokenizer.ggml.pre").unwrap_or_else(|| "default".to_owned());
        if let Some(rule) = pre_tokenizer(&pre)? {
            tokenizer.with_pre_tokenizer(Some(rule));
        }
        let special = |key: &str| {
            let id = content.metadata.get(key).and_then(|value| value.to_u32().ok());
            id.and_then(|id| tokenizer.id_to_token(id)).unwrap_or_default()
        };
        let (bos, eos) = (special("tokenizer.ggml.bos_token_id"), special("tokenizer.ggml.eos_token_id"));
        Self::new(tokenizer, text("tokenizer.chat_template"), bos, eos)
    }

    /// `tokenizer.json`, and the template of `chat_template.jinja` or `tokenizer_config.json`, of a directory.
    pub(crate) fn from_directory(dir: &Path) -> Result<Self, Error> {
        let tokenizer = Tokenizer::from_file(dir.join("tokenizer.json"))
            .map_err(|error| Error::Model(format!("{}: tokenizer.json: {error}", dir.display())))?;
        let config: serde_json::Value = fs::read_to_string(dir.join("tokenizer_config.json"))
            .ok()
            .and_then(|text| serde_json::from_str(&text).ok())
            .unwrap_or_default();
        // A special token is a string, or an object with its text in `content`.
        let special = |key: &str| {
            let token = &config[key];
            token.as_str().or_else(|| token["content"].as_str()).unwrap_or_default().to_owned()
        };
        let template = fs::read_to_string(dir.join("chat_template.jinja"))
            .ok()
            .or_else(|| chat_template(&config["chat_template"]));
        Self::new(tokenizer, template, special("bos_token"), special("eos_token"))
    }

    pub(crate) fn new(
        tokenizer: Tokenizer,
        template: Option<String>,
        bos: String,
        eos: String,
    ) -> Result<Self, Error> {
        let clock = Arc::default();
        let mut environment = environment(Arc::clone(&clock));
        environment.add_template_owned("chat", template.unwrap_or_else(|| CHATML.to_owned()))?;
        let pieces = (0..tokenizer.get_vocab_size(true) as u32).map(|id| piece(&tokenizer, id)).collect();
        let added = tokenizer.get_added_tokens_decoder();
        let special = added.into_values().filter(|token| token.special).map(|token| token.content).collect();
        Ok(Self { tokenizer, pieces, special, template: environment, clock, bos, eos })
    }

    /// Lets templates that write the date ask for the time.
    pub fn set_clock(&self, clock: fn() -> Timestamp) {
        let _set_before = self.clock.set(clock);
    }

    /// Tokens of a conversation up to where the assistant speaks next. Special tokens come from the template alone:
    /// a message that spells one out cannot end its turn or speak as another role.
    ///
    /// # Errors
    /// The template refuses the conversation, for example its order of roles.
    pub fn encode_chat(&self, messages: &[Message]) -> Result<Vec<u32>, Error> {
        let parted = |message: &Message| Message { role: message.role, content: self.part(&message.content) };
        let said = messages.iter().map(|message| message.content.len()).sum::<usize>();
        let mut text = Rendered { bytes: Vec::new(), most: RENDERED.saturating_add(said.saturating_mul(4)) };
        let context = context! {
            messages => messages.iter().map(parted).collect::<Vec<_>>(),
            add_generation_prompt => true,
            bos_token => self.bos,
            eos_token => self.eos,
        };
        self.template.get_template("chat")?.render_captured_to(context, &mut text)?;
        self.encode_parts(&String::from_utf8_lossy(&text.bytes))
    }

    /// Tokens of plain text, special tokens among them, with whatever the tokenizer puts before a text.
    pub fn encode_text(&self, text: &str) -> Result<Vec<u32>, Error> {
        self.encode(text, true)
    }

    /// Tokens of an answer: no special tokens are added, and those that it spells out count as text.
    pub fn encode_answer(&self, text: &str) -> Result<Vec<u32>, Error> {
        self.encode_parts(&self.part(text))
    }

    /// Puts [`PART`] within each special token that the text spells out.
    fn part(&self, text: &str) -> String {
        let mut parted = text.replace(PART, "");
        for special in &self.special {
            let mut characters = special.chars();
            if parted.contains(special)
                && let Some(first) = characters.next()
            {
                parted = parted.replace(special, &format!("{first}{PART}{}", characters.as_str()));
            }
        }
        parted
    }

    fn encode_parts(&self, text: &str) -> Result<Vec<u32>, Error> {
        let mut tokens = Vec::new();
        for part in text.split(PART) {
            tokens.extend(self.encode(part, false)?);
        }
        Ok(tokens)
    }

    fn encode(&self, text: &str, add_special: bool) -> Result<Vec<u32>, Error> {
        let encoding =
            self.tokenizer.encode(text, add_special).map_err(|error| Error::Tokenizer(error.to_string()))?;
        Ok(encoding.get_ids().to_vec())
    }

    /// The token's own bytes; not always UTF-8 by themselves, empty for special tokens.
    pub fn piece(&self, token: u32) -> &[u8] {
        self.pieces.get(token as usize).map_or(&[], Vec::as_slice)
    }

    /// The text of an answer's tokens; bytes that are no UTF-8 become `�`.
    pub fn decode(&self, tokens: &[u32]) -> String {
        let bytes: Vec<u8> = tokens.iter().flat_map(|token| self.piece(*token)).copied().collect();
        String::from_utf8_lossy(&bytes).into_owned()
    }
}

/// One template, or the one called `default` of several.
fn chat_template(value: &serde_json::Value) -> Option<String> {
    let named = |template: &&serde_json::Value| template["name"] == "default";
    let several = value.as_array().and_then(|several| several.iter().find(named));
    several.map_or(value, |default| &default["template"]).as_str().map(str::to_owned)
}

/// Jinja as transformers sets it up for chat templates.
/// Bytes that a template may add to what the messages say, four times.
const RENDERED: usize = 1 << 20;

/// What a template has written, which has an end: fuel bounds its steps, and each could write the whole conversation.
struct Rendered {
    bytes: Vec<u8>,
    most: usize,
}

impl io::Write for Rendered {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        if self.bytes.len() + bytes.len() > self.most {
            let why = format!("the chat template writes more than {} bytes", self.most);
            return Err(io::Error::new(io::ErrorKind::QuotaExceeded, why));
        }
        self.bytes.extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

fn environment(clock: Arc<OnceLock<fn() -> Timestamp>>) -> Environment<'static> {
    let invalid = |what: String| minijinja::Error::new(ErrorKind::InvalidOperation, what);
    let mut environment = Environment::new();
    environment.set_trim_blocks(true);
    environment.set_lstrip_blocks(true);
    // A template's loops end, whatever it says: a long conversation takes a hundredth of this.
    environment.set_fuel(Some(5_000_000));
    environment.set_unknown_method_callback(minijinja_contrib::pycompat::unknown_method_callback);
    environment.add_function("raise_exception", move |message: String| -> Result<(), minijinja::Error> {
        Err(invalid(message))
    });
    environment.add_function("strftime_now", move |format: String| {
        let now = clock.get().ok_or_else(|| invalid("strftime_now: there is no clock here".to_owned()))?;
        let items = StrftimeItems::new(&format).parse();
        let items = items.map_err(|_| invalid(format!("strftime_now: {format:?} is no format")))?;
        let time = DateTime::from_timestamp_millis(now().0 as i64).unwrap_or_default();
        Ok::<String, minijinja::Error>(time.format_with_items(items.iter()).to_string())
    });
    // minijinja's own is meant for HTML and escapes what stands in `<|…|>`.
    environment.add_filter("tojson", move |value: Value, options: Kwargs| {
        let indent: Option<usize> = options.get("indent")?;
        let text = match indent {
            None => serde_json::to_string(&value).map(|text| spaced(&text)),
            Some(width) => pretty(&value, width),
        };
        text.map_err(|error| invalid(format!("tojson: {error}")))
    });
    environment
}

/// Python puts a space after each comma and colon that is not within a string.
fn spaced(json: &str) -> String {
    let (mut out, mut quoted, mut escaped) = (String::with_capacity(json.len()), false, false);
    for character in json.chars() {
        out.push(character);
        match character {
            '"' if !escaped => quoted = !quoted,
            ',' | ':' if !quoted => out.push(' '),
            _ => {}
        }
        escaped = character == '\\' && !escaped;
    }
    out
}

fn pretty(value: &Value, width: usize) -> serde_json::Result<String> {
    let indent = " ".repeat(width.min(16));
    let mut out = Vec::new();
    let formatter = serde_json::ser::PrettyFormatter::with_indent(indent.as_bytes());
    value.serialize(&mut serde_json::Serializer::with_formatter(&mut out, formatter))?;
    Ok(String::from_utf8_lossy(&out).into_owned())
}

/// How text is split before byte-pair encoding, where candle's reader of GGUF does not know better by itself.
fn pre_tokenizer(name: &str) -> Result<Option<PreTokenizerWrapper>, Error> {
    let bytes = ByteLevel::new(false, true, true);
    match name {
        // SmolLM splits numbers into digits first.
        "smollm" => Ok(Some(Sequence::new(vec![Digits::new(true).into(), bytes.into()]).into())),
        "gpt-2" | "default" => Ok(Some(bytes.into())),
        "qwen2" | "smaug-bpe" | "lfm2" | "llama3" => Ok(None),
        other => Err(Error::Model(format!("GGUF: `tokenizer.ggml.pre` {other:?} is not supported"))),
    }
}

/// The bytes that a token stands for.
fn piece(tokenizer: &Tokenizer, id: u32) -> Vec<u8> {
    let Some(token) = tokenizer.id_to_token(id) else { return Vec::new() };
    let added = tokenizer.get_added_tokens_decoder();
    if let Some(added) = added.get(&id) {
        return if added.special { Vec::new() } else { token.into_bytes() };
    }
    // `<0xNN>` is how SentencePiece vocabularies spell single bytes.
    if let Some(byte) = token.strip_prefix("<0x").and_then(|rest| rest.strip_suffix('>'))
        && let Ok(byte) = u8::from_str_radix(byte, 16)
    {
        return vec![byte];
    }
    let bytes: Option<Vec<u8>> = token.chars().map(byte_of).collect();
    bytes.unwrap_or_else(|| token.replace('▁', " ").into_bytes())
}

/// The byte behind a character of GPT-2's byte-level alphabet: printable Latin-1 stands for itself, the other bytes
/// follow in order from U+0100.
fn byte_of(character: char) -> Option<u8> {
    let printable = |byte: u8| matches!(byte, 33..=126 | 161..=172 | 174..=255);
    let code = u32::from(character);
    match u8::try_from(code) {
        Ok(byte) => printable(byte).then_some(byte),
        Err(_) => (0..=255u8).filter(|byte| !printable(*byte)).nth(code as usize - 256),
    }
}

/// Whole characters out of a stream of tokens, held back where a stop string may be about to appear.
#[derive(Debug)]
pub(crate) struct Detokenizer {
    stop: Vec<String>,
    /// Bytes that are no whole character yet.
    bytes: Vec<u8>,
    /// Characters that may be the beginning of a stop string.
    held: String,
}

/// What a token adds to the answer.
#[derive(Debug, PartialEq)]
pub(crate) struct Piece {
    pub(crate) text: String,
    /// A stop string was met; the text ends before it.
    pub(crate) stopped: bool,
}

impl Detokenizer {
    pub(crate) fn new(stop: Vec<String>) -> Self {
        Self { stop, bytes: Vec::new(), held: String::new() }
    }

    /// Takes one token's bytes.
    pub(crate) fn push(&mut self, bytes: &[u8]) -> Piece {
        self.bytes.extend_from_slice(bytes);
        let whole = match std::str::from_utf8(&self.bytes) {
            Ok(text) => text.len(),
            // Bytes that can never become a character are shown as the replacement character at once.
            Err(error) if error.error_len().is_some() => self.bytes.len(),
            Err(error) => error.valid_up_to(),
        };
        let rest = self.bytes.split_off(whole);
        self.held.push_str(&String::from_utf8_lossy(&std::mem::replace(&mut self.bytes, rest)));
        if let Some(at) = self.stop.iter().filter_map(|stop| self.held.find(stop.as_str())).min() {
            self.held.truncate(at);
            return Piece { text: std::mem::take(&mut self.held), stopped: true };
        }
        let keep = self.undecided();
        let rest = self.held.split_off(self.held.len() - keep);
        Piece { text: std::mem::replace(&mut self.held, rest), stopped: false }
    }

    /// What was held back, once no more tokens come.
    pub(crate) fn finish(&mut self) -> String {
        let mut text = std::mem::take(&mut self.held);
        text.push_str(&String::from_utf8_lossy(&std::mem::take(&mut self.bytes)));
        text
    }

    /// Length of the longest end of the held text that begins a stop string.
    fn undecided(&self) -> usize {
        let begins = |len: &usize| {
            let tail = &self.held.as_bytes()[self.held.len() - len..];
            self.stop.iter().any(|stop| stop.as_bytes().starts_with(tail))
        };
        let longest = self.stop.iter().map(String::len).max().unwrap_or(0).min(self.held.len());
        // A tail that begins a stop string begins at a character, so the split above is sound.
        (1..=longest).rev().find(begins).unwrap_or(0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[track_caller]
    fn check(stop: &[&str], tokens: &[&[u8]], pieces: &[&str], rest: &str) {
        let mut detokenizer = Detokenizer::new(stop.iter().map(|stop| (*stop).to_owned()).collect());
        let found: Vec<String> = tokens.iter().map(|token| detokenizer.push(token).text).collect();
        assert_eq!(found, pieces);
        assert_eq!(detokenizer.finish(), rest);
    }

    #[test]
    fn characters_stay_whole() {
        let euro = "€".as_bytes();
        check(&[], &[b"a", &euro[..1], &euro[1..2], &euro[2..]], &["a", "", "", "€"], "");
        check(&[], &[b"a", &euro[..2]], &["a", ""], "\u{fffd}");
        check(&[], &[b"\xff", b"b"], &["\u{fffd}", "b"], "");
    }

    #[test]
    fn stop_strings_are_held_back_across_tokens() {
        check(&["END"], &[b"an E", b"N", b"d"], &["an ", "", "ENd"], "");
        check(&["END"], &[b"an E", b"ND of"], &["an ", ""], "");
        check(&["\n\n", "é"], &[b"x\n", "é".as_bytes()], &["x", "\n"], "");
    }

    #[track_caller]
    fn check_renders(template: &str, expected: &str) {
        let clock: Arc<OnceLock<fn() -> Timestamp>> = Arc::default();
        clock.set(|| Timestamp(1_721_995_200_000)).unwrap();
        let mut environment = environment(clock);
        environment.add_template("chat", template).unwrap();
        let context =
            context! { tool => context! { name => "a: \"b\", <|c|>", n => [1, 2] }, bos_token => "<s>" };
        let found = environment.get_template("chat").unwrap().render(context);
        assert_eq!(found.unwrap_or_else(|error| error.to_string()), expected);
    }

    /// The expected texts are those of `transformers.utils.chat_template_utils._compile_jinja_template`.
    #[test]
    fn templates_are_jinja_as_transformers_has_it() {
        check_renders("{{ tool | tojson }}", r#"{"name": "a: \"b\", <|c|>", "n": [1, 2]}"#);
        check_renders("{{ [1] | tojson(indent=2) }}", "[\n  1\n]");
        check_renders("{{ strftime_now('%d %b %Y') }}", "26 Jul 2024");
        check_renders(
            "{%- set ns = namespace(n=0) %}{% for i in range(9) %}{% if i > 3 %}{% break %}{% endif %}{% set ns.n = ns.n + i %}{% endfor %}{{ ns.n }}",
            "6",
        );
        check_renders("{{ ' Ab '.strip().upper() + bos_token[1:] }}{{ 'a,b'.split(',')[-1] }}", "ABs>b");
        check_renders(
            "{{ raise_exception('roles must alternate') }}",
            "invalid operation: roles must alternate (in chat:1)",
        );
        check_renders(
            "{{ strftime_now('%Q') }}",
            "invalid operation: strftime_now: \"%Q\" is no format (in chat:1)",
        );
        let endless = "{% for a in range(9999) %}{% for b in range(9999) %}{{ a }}{% endfor %}{% endfor %}";
        check_renders(endless, "engine ran out of fuel (in chat:1)");
    }

    #[test]
    fn every_byte_has_its_character() {
        assert_eq!(byte_of('!'), Some(b'!'));
        assert_eq!(byte_of('Ġ'), Some(b' '));
        assert_eq!(byte_of('Ċ'), Some(b'\n'));
        assert_eq!(byte_of('▁'), None);
    }
}
