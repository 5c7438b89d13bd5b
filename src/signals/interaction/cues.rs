//! The phrases by which the kinds of requests are known, with their weights.

use super::Kind::{
    self, Advice, Chat, Code, Maths, Question, Roleplay, Sensitive, Summarisation, Translation, Writing,
};

pub(super) const CUES: &[((Kind, f64), &str)] = &[
    (
        (Chat, 2.0),
        "hello|hi|hey|hiya|good morning|good evening|good afternoon|how are you|what's up|whats up|nice to meet you|bye",
    ),
    (
        (Chat, 2.0),
        "tell me about yourself|who are you|what is your name|what's your name|tell me a joke|i am bored|let's chat|goodbye",
    ),
    (
        (Chat, 1.5),
        "thank you|thanks|how was your day|do you like|are you human|what do you think of me|lol|haha|see you|good night",
    ),
    (
        (Chat, 2.0),
        "hallo|guten morgen|wie geht*|bonjour|salut|hola|buenos días|ciao|olá|привет|как дела|cześć|你好|こんにちは|안녕",
    ),
    (
        (Question, 1.0),
        "what is|what are|what was|what were|who is|who was|who are|when did|when was|when is|where is|where are|which|why",
    ),
    (
        (Question, 1.0),
        "how many|how much|how long|how far|how old|how does|how do|how did|explain|describe|define|what does|is it true",
    ),
    (
        (Question, 0.8),
        "what|who|when|where|how|does|do|did|is there|are there|can a|could a|tell me about|difference between|compare",
    ),
    (
        (Question, 1.0),
        "was ist|wer ist|wann|warum|wie viele|qu'est-ce|quel|quelle|pourquoi|qué es|quién|cuándo|por qué|che cos'è|perché",
    ),
    (
        (Question, 1.0),
        "o que é|quem é|wat is|wie is|co to|dlaczego|kto|что такое|почему|кто|когда|什么|为什么|谁|何ですか|なぜ|무엇|왜",
    ),
    (
        (Code, 2.0),
        "python|javascript|typescript|java|c++|rust|golang|sql|html|css|php|kotlin|bash|regex|regular expression|react|django",
    ),
    (
        (Code, 2.0),
        "write a function|write a program|write a script|unit test*|stack trace|compile*|debug*|refactor*|algorithm|source code",
    ),
    (
        (Code, 1.5),
        "function|code|script|api|json|yaml|docker*|kubernetes|git|exception|null pointer|segfault|recursion|linked list|binary tree",
    ),
    (
        (Code, 1.5),
        "array|loop|pandas|numpy|programming|database|query|endpoint|class method|implement|programmieren|código|программ*|代码|コード",
    ),
    (
        (Summarisation, 3.5),
        "summarize|summarise|summary of|summary|tl;dr|tldr|key points|main points|shorten|condense|in a nutshell",
    ),
    (
        (Summarisation, 3.5),
        "key takeaways|boil down|abstract of|give me the gist|fasse*|zusammenfass*|résume|résumé de|resume|resumen|riassum*",
    ),
    ((Summarisation, 3.5), "resuma|samenvatt*|streść|podsumuj|кратко|резюмир*|总结|摘要|概括|要約|요약"),
    (
        (Writing, 2.0),
        "write|draft|compose|rewrite|proofread|edit this|improve this|poem|essay|story|blog post|cover letter|article|lyrics|haiku",
    ),
    (
        (Writing, 1.5),
        "email|e-mail|letter|speech|slogan|headline|tweet|caption|product description|paragraph|screenplay|limerick|sonnet|outline",
    ),
    (
        (Writing, 2.0),
        "schreib*|verfasse*|gedicht|écris|rédige*|poème|escribe|redacta|scrivi|escreva|schrijf|napisz|напиши|写一|写封|書いて|써줘",
    ),
    (
        (Translation, 4.0),
        "translate|translation|translated|how do you say|in french|into english|to english|into spanish|into german|to spanish",
    ),
    (
        (Translation, 4.0),
        "to french|to german|into french|into japanese|into chinese|to japanese|to chinese|to italian|into italian|übersetz*",
    ),
    (
        (Translation, 4.0),
        "tradui*|traduce|traduci|tradu*|vertaal|przetłumacz|переведи|перевод|翻译|翻譯|翻訳|번역",
    ),
    (
        (Maths, 2.5),
        "calculate|solve|equation|integral|derivative|probability that|prove that|theorem|square root|triangle|polynomial|matrix",
    ),
    (
        (Maths, 2.0),
        "percent of|sum of|product of|factorial|prime number*|algebra|geometry|arithmetic|how much is|divided by|multiplied by|fraction",
    ),
    (
        (Maths, 2.0),
        "remainder|standard deviation|logarithm|modulo|average speed|berechne*|calcule|calcula|calcola|oblicz|вычисли|реши|计算|方程|計算",
    ),
    (
        (Advice, 2.0),
        "should i|what should i|advice|recommend*|suggest*|tips|how can i improve|help me decide|what would you do|is it a good idea",
    ),
    (
        (Advice, 1.8),
        "how do i deal|how can i deal|how do i get better|best way to learn|i feel|i am struggling|i have trouble|i am worried|my boss",
    ),
    (
        (Advice, 1.5),
        "my girlfriend|my boyfriend|my husband|my wife|my career|my relationship|plan a trip|ideas for|how can i|how do i|which should i",
    ),
    (
        (Advice, 2.0),
        "soll ich|sollte ich|rat geben|devrais-je|conseil*|debería|consejo*|dovrei|consigli*|deveria|moet ik|czy powinienem|стоит ли",
    ),
    ((Advice, 2.0), "посоветуй*|建议|我应该|アドバイス|조언"),
    (
        (Roleplay, 4.0),
        "pretend to be|pretend you|pretend that you|act as|act like|roleplay|role-play|role play|you are now|imagine you are|play the role",
    ),
    (
        (Roleplay, 4.0),
        "take on the role|stay in character|in the style of a pirate|as if you were|assume the role|let's play|dungeon master|you are a",
    ),
    (
        (Roleplay, 4.0),
        "spiel die rolle|tu bist|tu es un|actúa como|fais comme si|agisci come|aja como|представь, что ты|扮演|になりきって",
    ),
    (
        (Sensitive, 2.5),
        "suicid*|self-harm|kill myself|depress*|abuse|abused|rape|sexual*|abortion|overdose|eating disorder|panic attack*|addict*",
    ),
    (
        (Sensitive, 2.0),
        "diagnos*|my medication|chest pain|cancer|lawsuit|sue|divorce|custody|immigration status|bankrupt*|terroris*|genocide|racis*",
    ),
    (
        (Sensitive, 2.0),
        "religion|gun control|election|politic*|trump|biden|israel|palestin*|gender identity|transgender|drugs|domestic violence",
    ),
];
