//! The sidecar from outside: real HTTP, a real (tiny, seeded) model, a real store.
#![expect(clippy::unwrap_used, clippy::panic, reason = "tests")]

mod canary;
mod chat;
mod comparing;
mod description;
mod feedback;
mod harness;
mod judgements;
mod leaving;
mod lineage;
mod malformed;
mod openai;
mod pushing;
mod refusals;
mod relaying;
mod senses;
mod stub;
mod updates;
