use proptest::prelude::*;

use super::*;

#[derive(Debug, Clone)]
enum Step {
    Append { prompt: u8 },
    Thumbs { of: usize, key: Option<u8> },
    Compare { chosen: usize, rejected: usize },
    Retain { back: u64 },
    Reopen,
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        4 => (0..2_u8).prop_map(|prompt| Step::Append { prompt }),
        4 => (0..20_usize, proptest::option::of(0..6_u8)).prop_map(|(of, key)| Step::Thumbs { of, key }),
        3 => (0..20_usize, 0..20_usize).prop_map(|(chosen, rejected)| Step::Compare { chosen, rejected }),
        1 => (0..30_u64).prop_map(|back| Step::Retain { back }),
        1 => Just(Step::Reopen),
    ]
}

/// The store as maps.
#[derive(Default)]
struct Model {
    completions: BTreeMap<CompletionId, Completion>,
    feedback: BTreeMap<FeedbackId, Feedback>,
    seqs: BTreeMap<u64, Uuid>,
    next_seq: u64,
    /// All ids that ever were, so that steps also name answers that are gone.
    ids: Vec<CompletionId>,
}

impl Model {
    fn journal(&mut self, id: Uuid) {
        self.seqs.insert(self.next_seq, id);
        self.next_seq += 1;
    }

    /// Whether the store is to take it.
    fn attach(&mut self, feedback: &Feedback) -> bool {
        let same = |other: &&Feedback| other.idempotency_key == feedback.idempotency_key;
        if feedback.idempotency_key.is_some() && self.feedback.values().any(|other| same(&other)) {
            return false;
        }
        let Ok(subjects) = Subjects::of(feedback) else { return false };
        let prompts: Vec<_> = subjects.ids().map(|id| self.completions.get(&id).map(|c| &c.prompt)).collect();
        if prompts.contains(&None) || prompts.windows(2).any(|pair| pair[0] != pair[1]) {
            return false;
        }
        self.feedback.insert(feedback.id, feedback.clone());
        self.journal(feedback.id.0);
        true
    }

    fn retain(&mut self, before: Timestamp) {
        self.completions.retain(|_, completion| completion.at >= before);
        let known = |id| self.completions.contains_key(&id);
        self.feedback.retain(|_, feedback| Subjects::of(feedback).unwrap().ids().all(known));
        let (completions, feedback) = (&self.completions, &self.feedback);
        self.seqs.retain(|_, id| {
            completions.contains_key(&CompletionId(*id)) || feedback.contains_key(&FeedbackId(*id))
        });
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 24, ..ProptestConfig::default() })]

    #[test]
    fn the_store_is_the_model(steps in proptest::collection::vec(step(), 1..60)) {
        let dir = TempDir::new().unwrap();
        // 1e-6 days are 86.4 ms.
        let config = Config { retention_days: 1e-6, ..config(&dir) };
        let mut store = Store::open(&config).unwrap();
        let mut model = Model::default();
        for (n, step) in (1_u64..).zip(steps) {
            let pick = |ids: &[CompletionId], at: usize| ids.get(at % ids.len().max(1)).copied().unwrap_or_default();
            let at = 1000 + n;
            let attached = match step {
                Step::Append { prompt } => {
                    let completion = completion(at, n, &prompt.to_string());
                    store.append_blocking(&completion).unwrap();
                    model.journal(completion.id.0);
                    model.ids.push(completion.id);
                    model.completions.insert(completion.id, completion);
                    continue;
                }
                Step::Thumbs { of, key } => {
                    let key = key.map(|key| key.to_string());
                    thumbs(at, n, pick(&model.ids, of), key.as_deref())
                }
                Step::Compare { chosen, rejected } => {
                    comparison(at, n, pick(&model.ids, chosen), pick(&model.ids, rejected))
                }
                Step::Retain { back } => {
                    store.retain(Timestamp(at - back + 86)).unwrap();
                    model.retain(Timestamp(at - back));
                    continue;
                }
                Step::Reopen => {
                    drop(store);
                    store = Store::open(&config).unwrap();
                    continue;
                }
            };
            let stored = matches!(store.attach_blocking(&attached), Ok(Attached::Stored));
            prop_assert_eq!(stored, model.attach(&attached));
        }
        let completions: Vec<_> = store.completions(..).map(Result::unwrap).collect();
        prop_assert_eq!(&completions, &model.completions.values().cloned().collect::<Vec<_>>());
        let feedback: Vec<_> = store.feedback().map(Result::unwrap).collect();
        prop_assert_eq!(&feedback, &model.feedback.values().cloned().collect::<Vec<_>>());
        prop_assert_eq!(seqs(&store), model.seqs.keys().copied().collect::<Vec<_>>());
        prop_assert_eq!(store.counts().next_seq, model.next_seq);
        consistent(&store);
    }
}
