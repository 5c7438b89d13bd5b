//! What people say and do, as a value in `[0, 1]`: 0 dissatisfied, 1 satisfied.

use std::{collections::HashSet, sync::LazyLock};

use crate::completion::{Behaviour, Judgement, Prompt, Role, Source};

use super::text::{Lexicon, fold, words};

/// Satisfaction with the one answer that was judged; `None` where two are compared ([`comparison_values`]) or the
/// rating is none of 1 to 5.
///
/// Behaviour is weaker evidence than a verdict and stays off the ends: who copies an answer means to use it (0.9);
/// who asks for another one was not served, but sometimes only wants a choice (0.15); who edits it found it half of
/// the way (0.5); who leaves is mostly disappointed, but may have been interrupted (0.2). A demonstration is an
/// answer that had to be rewritten from nothing: 0.1.
pub fn satisfaction(judgement: &Judgement) -> Option<f64> {
    Some(match judgement {
        Judgement::Thumbs { up } => f64::from(u8::from(*up)),
        Judgement::Rating { stars: stars @ 1..=5 } => f64::from(stars - 1) / 4.0,
        Judgement::Rating { .. } | Judgement::Comparison { .. } | Judgement::TextComparison { .. } => {
            return None;
        }
        Judgement::Demonstration { .. } => 0.1,
        Judgement::Flag { .. } => 0.0,
        Judgement::Behaviour { behaviour } => match behaviour {
            Behaviour::Copied => 0.9,
            Behaviour::Edited => 0.5,
            Behaviour::Abandoned => 0.2,
            Behaviour::Regenerated => 0.15,
        },
    })
}

/// Satisfaction with the chosen and the rejected answer of a comparison.
///
/// Off the ends: the worse of two may still be good, and the better of two bad.
pub fn comparison_values() -> (f64, f64) {
    (0.8, 0.2)
}

/// How much a judgement counts in learning, in `(0, 1]`: 1 for what a person says outright.
///
/// A thumb says less than a comparison, a flag or a text; behaviour is only a hint. A judge model's verdict counts
/// half: it is cheap, and its errors are all of a kind.
pub fn weight(judgement: &Judgement, source: Source) -> f64 {
    let kind = match judgement {
        Judgement::Comparison { .. }
        | Judgement::TextComparison { .. }
        | Judgement::Demonstration { .. }
        | Judgement::Flag { .. } => 1.0,
        Judgement::Rating { .. } | Judgement::Thumbs { .. } => 0.8,
        Judgement::Behaviour { behaviour } => match behaviour {
            Behaviour::Regenerated => 0.3,
            Behaviour::Copied | Behaviour::Edited => 0.25,
            Behaviour::Abandoned => 0.1,
        },
    };
    match source {
        Source::Human => kind,
        Source::Ai => 0.5 * kind,
    }
}

/// What a user's next turn shows.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Reply {
    /// The answer was wrong: anywhere in the first sentences.
    Complaint,
    /// Complains as the turn's first words only: "No, …".
    Opening,
    Thanks,
    /// Praise as the turn's first word only: "Perfect!" is, "the perfect tense" is not.
    Praise,
    /// Thanks that open a complaint, or something else that takes the thanks back.
    But,
}

use Reply::{But, Complaint, Opening, Praise, Thanks};

const REPLIES: &[(Reply, &str)] = &[
    (
        Complaint,
        "that is wrong|that is not right|that is incorrect|that is not correct|this is wrong|you are wrong|you're wrong",
    ),
    (
        Complaint,
        "that is not what i|not what i asked|not what i meant|not what i wanted|i did not ask|i asked for|i meant",
    ),
    (
        Complaint,
        "you misunderstood|you did not answer|you did not|you ignored|you forgot|you missed|does not work|did not work",
    ),
    (
        Complaint,
        "is not working|still wrong|wrong again|try again|makes no sense|that is not true|not helpful|useless",
    ),
    (
        Complaint,
        "that was wrong|it is wrong|this is not what|read my question|read it again|you already said|this is incorrect",
    ),
    (
        Complaint,
        "das ist falsch|das stimmt nicht|ich meinte|nicht was ich|funktioniert nicht|du hast vergessen|c'est faux",
    ),
    (
        Complaint,
        "ce n'est pas ce que|ça ne marche pas|je voulais dire|eso no es|está mal|no funciona|me refería|es incorrecto",
    ),
    (
        Complaint,
        "non è quello che|è sbagliato|non funziona|isso está errado|não é isso|não funciona|dat klopt niet|dat is fout",
    ),
    (
        Complaint,
        "ik bedoelde|to nieprawda|nie o to|nie działa|это неправильно|это не то|не работает|я имел в виду",
    ),
    (Complaint, "不对|错了|不是这个意思|我的意思是|違います|間違って|そうじゃない|틀렸|그게 아니"),
    (
        Opening,
        "no,|no.|no!|nope|wrong|nein,|nein.|non,|no that|no i|no it|no you|não,|nee,|nie,|нет,|incorrect|that's not",
    ),
    (
        Thanks,
        "thank you|thanks|thank u|thx|great answer|exactly what i|that works|it worked|that helped|very helpful|love it",
    ),
    (
        Thanks,
        "that is great|that is perfect|danke|genau das|merci|gracias|grazie|obrigad*|bedankt|dank je|dziękuję|dzięki|спасибо",
    ),
    (Thanks, "谢谢|謝謝|太好了|ありがとう|감사|고마워"),
    (
        Praise,
        "perfect|great|awesome|excellent|brilliant|wonderful|amazing|well done|good job|nice one|cheers|super|parfait",
    ),
    (Praise, "perfecto|perfetto|perfeito|отлично|prima|genial|it works"),
    (
        But,
        "but|however|though|no thanks|no thank you|thanks for nothing|in advance|aber|mais|pero|ma|mas|maar|ale|но|但是",
    ),
];

/// Words that carry no topic; without them the overlap of two requests says something.
const STOP_WORDS: &str = " a an the and or of to in on for with is are was be it this that i you me my your we can could \
    would please do does how what which who when where why not no at by from as so if then about give tell ";

/// Satisfaction with an answer as the user's next request tells it; `None` where it tells nothing.
///
/// A complaint is 0, thanks are 1, the same request again or in other words 0.2. Thanks with a "but" tell nothing.
pub fn next_turn(previous_request: &str, next_request: &str) -> Option<f64> {
    static LEXICON: LazyLock<Lexicon<Reply>> = LazyLock::new(|| Lexicon::new(REPLIES));
    // Later on, a turn speaks of its own matters.
    let opening = fold(next_request, 240);
    let hits = LEXICON.hits(&opening);
    let early = || hits.iter().filter(|hit| hit.sentence <= 1 && !hit.quoted);
    let has = |reply| early().any(|hit| hit.tag == reply);
    let opens_with = |reply| early().any(|hit| hit.tag == reply && hit.start == 0);
    if has(Complaint) || opens_with(Opening) {
        return Some(0.0);
    }
    if rephrases(previous_request, next_request) {
        return Some(0.2);
    }
    ((has(Thanks) || opens_with(Praise)) && !has(But)).then_some(1.0)
}

/// What a conversation's newest user turn says of the answer before it.
pub fn said_of_last(prompt: &Prompt) -> Option<f64> {
    let Prompt::Chat(messages) = prompt else { return None };
    let mut turns = messages.iter().rev().filter(|message| message.role == Role::User);
    let (next, previous) = (turns.next()?, turns.next()?);
    next_turn(&previous.content, &next.content)
}

/// Most of the topic words of each request are in the other one.
fn rephrases(previous: &str, next: &str) -> bool {
    const READ: usize = 8 << 10;
    let (previous, next) = (fold(previous, READ), fold(next, READ));
    let (before, after) = (topic(&previous), topic(&next));
    let shared = before.intersection(&after).count();
    let all = before.len() + after.len() - shared;
    // Of two words in common nothing can be concluded, unless they are all.
    (shared >= 3 && shared * 5 >= all * 3) || (shared >= 1 && shared == all)
}

fn topic(folded: &str) -> HashSet<&str> {
    words(folded).filter(|word| !STOP_WORDS.contains(&format!(" {word} "))).collect()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::completion::{CompletionId, Flag};

    #[test]
    fn judgements_have_their_values() {
        let value = |judgement| satisfaction(&judgement);
        assert_eq!(value(Judgement::Thumbs { up: true }), Some(1.0));
        assert_eq!(value(Judgement::Thumbs { up: false }), Some(0.0));
        for (stars, expected) in
            [(1, Some(0.0)), (3, Some(0.5)), (5, Some(1.0)), (0, None), (6, None), (255, None)]
        {
            assert_eq!(value(Judgement::Rating { stars }), expected, "{stars} stars");
        }
        assert_eq!(value(Judgement::Flag { flag: Flag::Incorrect }), Some(0.0));
        assert_eq!(value(Judgement::Behaviour { behaviour: Behaviour::Copied }), Some(0.9));
        let (chosen, rejected) = (CompletionId::new(), CompletionId::new());
        assert_eq!(value(Judgement::Comparison { chosen, rejected }), None);
        let [chosen, rejected] = ["a", "b"].map(str::to_owned);
        assert_eq!(
            value(Judgement::TextComparison { prompt: Prompt::Text(String::new()), chosen, rejected }),
            None
        );
    }

    #[test]
    fn people_count_more_than_judge_models_and_words_more_than_behaviour() {
        let thumb = Judgement::Thumbs { up: true };
        let copied = Judgement::Behaviour { behaviour: Behaviour::Copied };
        assert!(weight(&thumb, Source::Human) > weight(&thumb, Source::Ai));
        assert!(weight(&thumb, Source::Ai) > weight(&copied, Source::Human));
        assert!(weight(&copied, Source::Ai) > 0.0);
    }

    #[track_caller]
    fn check(previous: &str, next: &str, expected: Option<f64>) {
        assert_eq!(next_turn(previous, next), expected, "{next}");
    }

    #[test]
    fn complaints() {
        for next in [
            "That's wrong, the river is in Peru.",
            "No, I meant the programming language.",
            "no. shorter please",
            "Hmm. You didn't answer my question.",
            "Thanks, but that is not what I asked for",
            "Nein, ich meinte den Fluss.",
            "C’est faux.",
            "不对，请再试一次",
        ] {
            check("Tell me about Python.", next, Some(0.0));
        }
    }

    #[test]
    fn thanks() {
        for next in
            ["Thanks!", "Perfect, that works. Now add a chart.", "Vielen Dank! Danke!", "谢谢", "ありがとう"]
        {
            check("Plot these numbers.", next, Some(1.0));
        }
        check("Plot these numbers.", "Thanks, but can you use red?", None);
    }

    #[test]
    fn the_same_again() {
        check("What is the capital of Australia?", "what is the capital of australia", Some(0.2));
        check(
            "What is the capital city of Australia?",
            "Which city is Australia's capital? The capital city of Australia",
            Some(0.2),
        );
        check(
            "List cheap vegan restaurants in Berlin",
            "Can you list vegan restaurants in Berlin please?",
            Some(0.2),
        );
    }

    #[test]
    fn other_turns_tell_nothing() {
        for next in [
            "Now translate it to French.",
            "And how many people live there?",
            "",
            "Is there no other way?",
            "Write a story in which a man says \"that's wrong\" to a judge.",
            "What is the perfect tense?",
            "Nobody told me. What comes next?",
        ] {
            check("What is the capital of Australia?", next, None);
        }
        check("", "", None);
    }

    proptest! {
        #[test]
        fn any_text_is_fine(previous in "\\PC{0,80}", next in "\\PC{0,80}") {
            prop_assert!(next_turn(&previous, &next).is_none_or(|value| (0.0..=1.0).contains(&value)));
        }
    }
}
