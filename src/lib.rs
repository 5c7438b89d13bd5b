//! gyrostat: a sidecar that keeps an RLHF-trained language model aligned while it is in use.
//!
//! The modules in the order in which data flows: a request becomes a [`completion`] of the [`policy`], [`signals`] read
//! it, the [`store`] keeps it with what people say of it, [`drift`] watches, [`learn`] trains a candidate, the [`gate`]
//! judges it, the [`canary`] tries it on a few users, the [`registry`] serves it; [`comparisons`] are what people and judge models are asked. [`cycle`] is that loop, [`http`] its door, [`app`] puts everything together.

pub mod app;
pub mod canary;
pub mod cli;
pub mod comparisons;
pub mod completion;
pub mod config;
pub mod cycle;
pub mod demo;
pub mod drift;
pub mod gate;
pub mod http;
pub mod learn;
pub mod policy;
pub mod registry;
pub mod signals;
pub mod store;
pub mod upstream;
