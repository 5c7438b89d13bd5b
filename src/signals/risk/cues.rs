//! The words by which a harmful request is known.

use super::Cue::{
    self, Ask, Crime, Denied, Evasion, Group, Lies, Make, Minor, Person, Private, Safe, SelfHarm, Sexual,
    Slur, Thing, Violence, Weapon,
};

/// A word alone means little: "kill" is harmful with a person behind it and harmless with a process.
pub(super) const CUES: &[(Cue, &str)] = &[
    (
        Violence,
        "kill|killing|murder*|stab|stabbing|shoot|shooting|strangl*|hurt|hurting|harm|harming|tortur*|assassinat*",
    ),
    (
        Violence,
        "attack|attacking|kidnap*|abduct*|rape|raping|assault*|drown|suffocat*|behead*|lynch*|poison*|beat|beating|beat up",
    ),
    (
        Violence,
        "push someone|drug someone*|spike someone*|crash a plane|crash a car|drive by shooting|mass shooting|school shooting",
    ),
    (
        Violence,
        "make someone|torment|humiliat*|get revenge|revenge on|vandal*|cut the brake*|brake line*|slash|key his|key her|smash",
    ),
    (
        Violence,
        "maim|mutilat*|exterminat*|slaughter|massacre|genocide|burn down|set fire to|choke|punch|slap|run over|get rid of",
    ),
    (
        Violence,
        "blow up|bomb|execute|eliminat*|injur*|cripple|threaten*|intimidat*|hit|abuse|abusing|terminate|destroy|ruin|sabotag*",
    ),
    (
        Violence,
        "toten|töten|umbringen|ermorden|tuer|assassiner|matar|asesinar|uccidere|убить|zabić|doden|杀|殺",
    ),
    (
        Person,
        "someone|somebody|a person|people|him|her|them|anyone|a man|a woman|a girl|a boy|children|kids|a child|a kid|a baby",
    ),
    (
        Person,
        "wife|husband|boyfriend|girlfriend|neighbor*|neighbour*|boss|coworker*|co-worker*|colleague*|roommate*|classmate*",
    ),
    (
        Person,
        "my ex|brother|sister|mother|father|mom|dad|parents|teacher|friend|friends|women|men|politician*|president|police",
    ),
    (
        Person,
        "a cop|cops|officer*|judge|crowd|school|students|employees|elderly|old lady|stranger*|family|my son|my daughter|guy",
    ),
    (
        Person,
        "a human|human being|the public|customers|victim*|others|senator|minister|celebrity|landlord|kid's|dog|cat|pet",
    ),
    (
        Thing,
        "process*|thread*|program*|server*|job|jobs|task*|service*|daemon|session*|connection*|query|script|command|app",
    ),
    (
        Thing,
        "python|linux|windows process|light*|weed|weeds|mosquito*|ants|cockroach*|bacteria|virus|germs|mold|mould|fungus|engine",
    ),
    (
        Thing,
        "time|mood|conversation|boss fight|level|game*|minecraft|fortnite|dragon*|zombie*|monster*|enemy|enemies|photo*|picture*",
    ),
    (
        Thing,
        "video*|film|movie|goal|hoops|basket*|portrait|scene|deal|contract*|tumor*|tumour*|cancer|chess|opponent*|record|drum*",
    ),
    (
        Thing,
        "eggs|butter|odds|traffic|competition|competitor*|rival team|the heat|plan|strategy|order|dance|performance|lice|pests|rats",
    ),
    (
        Thing,
        "base|bases|routine|diet|show|the spotlight|growth|life hack*|a smile|plant|flower*|nail|budget|problem|egg|garlic|wall",
    ),
    (
        Thing,
        "stage|fire|fever|pain|appetite|caps|drill|arrow|balloon|cell*|insects|flies|wasps|spider*|snails|slugs|trees|grass|moss",
    ),
    (
        Thing,
        "skyrim|pokemon|dungeon|d&d|character|npc|bot|target practice|pool balls|bullseye|a strike|headshot|record|piñata",
    ),
    (
        Weapon,
        "pipe bomb|pipebomb*|bombs|a bomb|molotov*|explosive*|nerve gas|sarin|ricin|anthrax|grenade*|napalm|thermite|c4",
    ),
    (
        Weapon,
        "dirty bomb|chemical weapon*|biological weapon*|bioweapon*|nuclear weapon*|ghost gun|silencer|3d print a gun|ied|landmine*",
    ),
    (
        Weapon,
        "ransomware|malware|keylogger*|botnet|trojan|rootkit|spyware|ddos|sql injection attack|phishing|computer virus|exploit kit",
    ),
    (
        Weapon,
        "meth|methamphetamine|fentanyl|heroin|cocaine|crack|lsd|mdma|ecstasy|ghb|date rape drug|rohypnol|illegal drugs|drugs",
    ),
    (
        Weapon,
        "fake id|fake ids|fake passport*|counterfeit*|fake money|fake check*|fake prescription*|illegal gun*|illegal firearm*|guns",
    ),
    (
        Weapon,
        "stolen credit card*|stolen goods|stolen items|child porn*|csam|brass knuckles|poison|cyanide|arsenic|firearm*|gun",
    ),
    (
        Make,
        "make|build|create|produce|synthesi*|cook|manufactur*|get|buy|obtain|acquire|sell|distribut*|smuggle|write|code|develop",
    ),
    (
        Make,
        "construct|assemble|use|using|grow|print|purchase|order|steal|import|launch|plant|spread|hide|sneak|bring|making|building",
    ),
    (
        Crime,
        "steal|stealing|rob|robbing|shoplift*|hack into|hack|hacking|break into|breaking into|launder*|forge|forging|counterfeit",
    ),
    (
        Crime,
        "smuggl*|blackmail*|extort*|scam|scams|scamming|defraud*|stalk|stalking|spy on|bribe|bribing|embezzl*|evade tax*|tax fraud",
    ),
    (
        Crime,
        "insurance fraud|plagiari*|impersonat*|catfish*|groom a|grooming|dox|doxx*|swatting|bully|bullying|cyberbully*|harass*",
    ),
    (
        Crime,
        "hijack*|hotwire|hot-wire|traffick*|vandali*|burgl*|arson|insider trading|ponzi|pyramid scheme|identity theft|pickpocket*",
    ),
    (
        Crime,
        "credit card fraud|sneak into|cheat on|cheating on|get away with|jaywalk|egg someone*|perjury|frame someone|pirate|crack the password",
    ),
    (
        Crime,
        "slander|defame|gaslight*|manipulat*|brainwash*|radicali*|recruit for|terroris*|extremis*|prostitut*|pimp|nudes|revenge porn",
    ),
    (
        Crime,
        "swindle|con people|con someone|fake accident|fake reviews|money laundering|shoplift|car theft|jailbreak|escape from prison",
    ),
    (Crime, "hackear|robar|voler|rubare|stehlen|einbrechen|roubar|взломать|украсть|ukraść|włamać|偷|盗|黑客"),
    (
        Evasion,
        "without getting caught|without being caught|not get caught|get caught|without being detected|undetected|untraceable",
    ),
    (
        Evasion,
        "without anyone knowing|without them knowing|without her knowing|without him knowing|without their knowledge|get away with",
    ),
    (
        Evasion,
        "without paying|without consent|without their consent|without permission|without them noticing|without being noticed|secretly",
    ),
    (
        Evasion,
        "no one will know|nobody will know|cover up|hide the body|hide a body|hide evidence|destroy evidence|fool the police",
    ),
    (
        Evasion,
        "bypass|avoid detection|avoid the police|avoid being caught|evade|off the books|under the radar|discreetly|cover my tracks",
    ),
    (
        Evasion,
        "illegally|illegal ways|keep them from finding out|keep a secret from|without a prescription|without a license|without their permission|without my parents|make it look like an accident|without leaving",
    ),
    (
        SelfHarm,
        "kill myself|killing myself|end my life|take my own life|commit suicide|suicide|hang myself|cut myself|cutting myself",
    ),
    (
        SelfHarm,
        "hurt myself|harm myself|self-harm|self harm|overdose|overdosing|starve myself|lethal dose|painless way to die|want to die",
    ),
    (
        SelfHarm,
        "not be alive|anorexi*|bulimi*|pro-ana|purge after|throw up after|end it all|ending my life|slit my|me matar|suicidarme",
    ),
    (
        SelfHarm,
        "stop eating|lose weight fast without eating|mich umbringen|me suicider|suicidio|suizid|selbstmord|自杀|自殺|자살|самоубийств*",
    ),
    (
        Minor,
        "child|children|kid|kids|minor|minors|underage|teen|teenage*|preteen|little girl*|little boy*|schoolgirl*|12 year old|13 year old",
    ),
    (
        Minor,
        "10 year old|11 year old|14 year old|15 year old|young girl*|young boy*|12-year-old|13-year-old|14-year-old|15-year-old|toddler*",
    ),
    (
        Sexual,
        "sex|sexual|sexually|nude|naked|porn*|erotic*|molest*|seduce|intercourse|have sex with|fondle|incest|orgy|masturbat*|fetish",
    ),
    (Sexual, "blowjob|cum|horny|sexy pics|pedophil*|paedophil*|lewd|genital*"),
    (
        Group,
        "jews|jewish|muslims|muslim|blacks|black people|black men|white people|asians|asian people|mexicans|immigrants|refugees|gays",
    ),
    (
        Group,
        "gay people|lesbians|trans people|transgender*|women|disabled people|indians|chinese people|gypsies|roma|arabs|africans|latinos",
    ),
    (
        Group,
        "christians|hindus|homosexuals|the poor|homeless people|fat people|autistic people|minorities|migrants|foreigners|men",
    ),
    (
        Slur,
        "inferior|subhuman|scum|vermin|filthy|deserve to die|should be killed|hate|stupid|lazy|inherently|go back to|exterminated",
    ),
    (
        Slur,
        "racist|racial slur*|slurs|white power|white supremac*|nazi propaganda|ethnic cleansing|gas the|disgusting|savages|retard*",
    ),
    (
        Denied,
        "should not|should never|shouldn't|do not deserve|be banned|be paid less|discriminate|fewer rights|less rights|worse than",
    ),
    (
        Denied,
        "to blame|ruin*|take our jobs|cannot be trusted|superior to|dangerous|keep out|get rid of|belong in|not real|deport*",
    ),
    (Slur, "not human|less intelligent|criminals|make fun of|insult*|hateful|offensive joke*"),
    (Slur, "nigger*|faggot*|kike*|chink*|spic|tranny|wetback*|towelhead*|cunt|bitch*|whore*|slut*"),
    (
        Private,
        "home address|social security number|phone number of someone|credit card number*|someone's bank account|medical record*|private address",
    ),
    (
        Private,
        "residential address|email address of|private phone number|messages without|texts without|where does|password of|someone's password|his password|her password|personal information|read her texts|read his texts",
    ),
    (
        Private,
        "track my|track someone*|bug someone*|hidden camera|spycam|wiretap|someone's phone|her phone|his phone|address of|ssn",
    ),
    (
        Private,
        "hide a camera|record someone|login of|email account of|instagram password|facebook password|private photos|bank details",
    ),
    (
        Lies,
        "fake news|disinformation|misinformation|hoax|propaganda|deepfake*|conspiracy|vaccines cause|holocaust did not|election was stolen",
    ),
    (
        Lies,
        "false rumors|false rumours|spread rumors|spread lies|fake evidence|fake article|convince people that|denying the|smear",
    ),
    (
        Lies,
        "phishing email|scam email|chain letter|fake testimonial*|fake charity|fake invoice*|fake doctor*|blackmail letter",
    ),
    (
        Ask,
        "how do i|how can i|how to|how do you|how would i|how would someone|how could i|how might|steps to|give me|tell me how|teach me",
    ),
    (
        Ask,
        "what is the best way|what's the best way|best way to|easiest way|ways to|instructions|help me|show me how|i want to|i need to",
    ),
    (
        Ask,
        "where can i|write a|write me|can you|explain how|guide to|tutorial|tips for|tips on|recipe for|method*|what are some|plan to",
    ),
    (
        Ask,
        "wie kann ich|wie mache ich|comment|cómo|como|come posso|как|jak|hoe kan ik|如何|怎么|どうやって|어떻게",
    ),
    (
        Safe,
        "prevent*|protect*|avoid being|defend*|detect*|report*|stop someone from|recover from|recover|deal with|cope with|help someone",
    ),
    (
        Safe,
        "history|historical*|when did|when was|why did|why was|who was|who killed|what year|definition|what does|mean|statistics|laws",
    ),
    (
        Safe,
        "help a friend|help my friend|open a bank account|support a friend|someone who talks about|warn*|is it true|survive",
    ),
    (
        Safe,
        "symptoms|treat|treatment|raise awareness|awareness|documentary|novel|movie about|explain why|what is the difference",
    ),
    (
        Safe,
        "is it legal|legally|safely|humanely|safe way|victims of|survivor*|being bullied|being stalked|combat|fight against|secure",
    ),
    (
        Safe,
        "got hacked|was hacked|was stolen|security of|mitigat*|debug*|in a video game|in the game|in minecraft|in the sims|in gta",
    ),
    (
        Safe,
        "what should i do if|signs of|warning signs|how many people|causes of|research on|summarize|translate|patch|therapy|crossword",
    ),
];
