//! `gyrostat serve`: the sidecar, until it is told to stop.

use std::time::Duration;

use crate::app::App;
use crate::config::Config;

use super::{Error, jsonl, model};

pub(super) fn run(mut config: Config) -> Result<(), Error> {
    if config.policy.model == "default" && config.upstream.url.is_none() {
        config.policy.model = model::fetched()?.to_string_lossy().into_owned();
    }
    let drain = Duration::try_from_secs_f64(config.http.drain_seconds)?;
    runtime()?.block_on(async {
        let app = App::start(config).await?;
        writeln!(
            jsonl::writer("-")?,
            "gyrostat serves {} on http://{}",
            app.state.backend.model_name(),
            app.address
        )?;
        stopped().await?;
        app.stop(drain).await;
        Ok(())
    })
}

/// The threads that wait for the network; the model has its own.
pub(super) fn runtime() -> std::io::Result<tokio::runtime::Runtime> {
    tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build()
}

/// Returns at Ctrl-C or SIGTERM.
async fn stopped() -> std::io::Result<()> {
    #[cfg(unix)]
    {
        let mut terminate = tokio::signal::unix::signal(tokio::signal::unix::SignalKind::terminate())?;
        tokio::select! {
            pressed = tokio::signal::ctrl_c() => pressed,
            _ = terminate.recv() => Ok(()),
        }
    }
    #[cfg(not(unix))]
    tokio::signal::ctrl_c().await
}
