//! Server-sent events, as the HTML standard has them, from chunks that may end anywhere.
//!
//! <https://html.spec.whatwg.org/multipage/server-sent-events.html#event-stream-interpretation>

/// Reads the data of events out of a stream of bytes. It keeps the unfinished line and event, and nothing else.
#[derive(Debug, Default)]
pub struct Parser {
    line: Vec<u8>,
    data: Vec<u8>,
    /// A `data` line came since the last event.
    has_data: bool,
    /// The last byte was a carriage return, so that a line feed belongs to it.
    after_return: bool,
    /// The first line has been read, before which a byte order mark may stand.
    begun: bool,
    overflown: bool,
}

/// Bytes of a line, and of an event, at most. An event that is longer is not an answer's token.
pub const LONGEST: usize = 4 << 20;

impl Parser {
    /// Takes the next bytes; calls `event` with the data of each event that they end.
    pub fn feed(&mut self, mut bytes: &[u8], mut event: impl FnMut(&[u8])) {
        while !bytes.is_empty() && !self.overflown {
            if self.after_return {
                self.after_return = false;
                if let Some(rest) = bytes.strip_prefix(b"\n") {
                    bytes = rest;
                    continue;
                }
            }
            let Some(end) = bytes.iter().position(|byte| matches!(byte, b'\n' | b'\r')) else {
                self.keep(bytes);
                return;
            };
            self.keep(&bytes[..end]);
            self.after_return = bytes[end] == b'\r';
            bytes = &bytes[end + 1..];
            self.end_line(&mut event);
        }
    }

    /// The stream has ended. An event without its empty line counts: some services forget the last one.
    pub fn finish(&mut self, mut event: impl FnMut(&[u8])) {
        if !self.line.is_empty() {
            self.end_line(&mut event);
        }
        self.dispatch(&mut event);
    }

    /// An event was too long; the rest of the stream is not read.
    pub fn is_overflown(&self) -> bool {
        self.overflown
    }

    fn keep(&mut self, bytes: &[u8]) {
        if self.line.len() + bytes.len() > LONGEST {
            *self = Self { overflown: true, ..Self::default() };
        } else {
            self.line.extend_from_slice(bytes);
        }
    }

    fn end_line(&mut self, event: &mut impl FnMut(&[u8])) {
        let line = std::mem::take(&mut self.line);
        let first = !std::mem::replace(&mut self.begun, true);
        let text = match line.strip_prefix(b"\xef\xbb\xbf") {
            Some(rest) if first => rest,
            _ => line.as_slice(),
        };
        if text.is_empty() {
            self.dispatch(event);
        } else if let Some(data) = data_of(text) {
            if self.data.len() + data.len() >= LONGEST {
                *self = Self { overflown: true, ..Self::default() };
                return;
            }
            if self.has_data {
                self.data.push(b'\n');
            }
            self.has_data = true;
            self.data.extend_from_slice(data);
        }
        // The line's memory serves the next line.
        self.line = line;
        self.line.clear();
    }

    fn dispatch(&mut self, event: &mut impl FnMut(&[u8])) {
        if std::mem::take(&mut self.has_data) {
            event(&self.data);
            self.data.clear();
        }
    }
}

/// The value of a `data` line; `None` for other fields and for comments.
fn data_of(line: &[u8]) -> Option<&[u8]> {
    let value = line.strip_prefix(b"data")?;
    if value.is_empty() {
        return Some(value);
    }
    let value = value.strip_prefix(b":")?;
    Some(value.strip_prefix(b" ").unwrap_or(value))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn events(chunks: &[&[u8]]) -> Vec<String> {
        let (mut parser, mut found) = (Parser::default(), Vec::new());
        let mut keep = |data: &[u8]| found.push(String::from_utf8_lossy(data).into_owned());
        for chunk in chunks {
            parser.feed(chunk, &mut keep);
        }
        parser.finish(&mut keep);
        found
    }

    #[track_caller]
    fn check(stream: &str, wanted: &[&str]) {
        assert_eq!(events(&[stream.as_bytes()]), wanted, "{stream:?}");
        let single: Vec<&[u8]> = stream.as_bytes().chunks(1).collect();
        assert_eq!(events(&single), wanted, "{stream:?} byte by byte");
    }

    #[test]
    fn events_in_every_framing() {
        check("data: a\n\ndata: b\n\n", &["a", "b"]);
        check("data: a\r\n\r\ndata: b\r\rdata: c\n\n", &["a", "b", "c"]);
        check("\u{feff}data:a\n\n", &["a"]);
        check(": ping\n\nevent: x\nid: 7\ndata: a\nretry: 3\n\n", &["a"]);
        check("data: a\ndata:  b\ndata\n\n", &["a\n b\n"]);
        check("data\n\n", &[""]);
        check("database: a\n\n", &[]);
        check("data: a", &["a"]);
        check("data: a\n\n\n\n", &["a"]);
        check("data: \u{1F600}é\n\n", &["\u{1F600}é"]);
        check("", &[]);
    }

    #[test]
    fn an_endless_line_is_given_up() {
        let mut parser = Parser::default();
        let mut seen = 0;
        parser.feed(b"data: a\n\ndata: ", |_| seen += 1);
        for _ in 0..=LONGEST / 1000 {
            parser.feed(&[b'x'; 1000], |_| seen += 1);
        }
        assert!(parser.is_overflown());
        parser.feed(b"\n\ndata: b\n\n", |_| seen += 1);
        assert_eq!(seen, 1);
        // Many short lines of one event are bounded, too.
        let mut parser = Parser::default();
        for _ in 0..=LONGEST / 1000 {
            parser.feed(&[b"data: ".as_slice(), &[b'x'; 1000], b"\n"].concat(), |_| seen += 1);
        }
        assert!(parser.is_overflown());
    }

    proptest! {
        #[test]
        fn any_chunking_gives_the_same_events(
            stream in "(data|data:|: |\r|\n|\r\n|é|[a-z]{1,3}|\u{feff}| ){0,60}",
            cuts in proptest::collection::vec(0usize..200, 0..20),
        ) {
            let bytes = stream.as_bytes();
            let mut cuts: Vec<usize> = cuts.into_iter().map(|cut| cut.min(bytes.len())).collect();
            cuts.extend([0, bytes.len()]);
            cuts.sort_unstable();
            let chunks: Vec<&[u8]> = cuts.windows(2).map(|pair| &bytes[pair[0]..pair[1]]).collect();
            prop_assert_eq!(events(&chunks), events(&[bytes]));
        }
    }
}
