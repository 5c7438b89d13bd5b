//! The listener, its connections, and the way out.
//!
//! axum's own loop sets no bound on how long a request's headers may take, and stops listening at once when it is told to
//! stop; here `/readyz` goes on answering, with 503, until the last request under way has its answer.

use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicUsize, Ordering},
    },
    time::Duration,
};

use axum::Router;
use hyper::server::conn::http1;
use hyper_util::{
    rt::{TokioIo, TokioTimer},
    server::graceful::GracefulShutdown,
    service::TowerToHyperService,
};
use tokio::{net::TcpListener, sync::Notify};
use tracing::{debug, warn};

/// Where the server stands between its start and its end.
#[derive(Debug, Default)]
pub struct Life {
    warm: AtomicBool,
    draining: AtomicBool,
    under_way: AtomicUsize,
    idle: Notify,
}

/// One request that has no answer, or not all of it.
#[derive(Debug)]
pub(super) struct UnderWay(Arc<Life>);

impl Drop for UnderWay {
    fn drop(&mut self) {
        if self.0.under_way.fetch_sub(1, Ordering::AcqRel) == 1 {
            self.0.idle.notify_waiters();
        }
    }
}

impl Life {
    /// The model is warm.
    pub fn warmed(&self) {
        self.warm.store(true, Ordering::Release);
    }

    /// New requests are refused from now on; returns when those under way have their answers.
    pub async fn drain(&self) {
        self.draining.store(true, Ordering::Release);
        loop {
            let idle = self.idle.notified();
            if self.under_way() == 0 {
                return;
            }
            idle.await;
        }
    }

    pub fn is_draining(&self) -> bool {
        self.draining.load(Ordering::Acquire)
    }

    /// Requests that have no answer yet, or not all of it.
    pub fn under_way(&self) -> usize {
        self.under_way.load(Ordering::Acquire)
    }

    /// Why requests should go elsewhere, if they should.
    pub(super) fn fault(&self) -> Option<&'static str> {
        if self.is_draining() {
            Some("the server is stopping")
        } else if self.warm.load(Ordering::Acquire) {
            None
        } else {
            Some("the model is warming up")
        }
    }

    pub(super) fn enter(self: &Arc<Self>) -> UnderWay {
        self.under_way.fetch_add(1, Ordering::AcqRel);
        UnderWay(Arc::clone(self))
    }
}

/// Serves until `stop`, then ends connections that are idle, and the others after their answer.
///
/// A connection that takes longer than `header_time` for a request's headers is closed; that includes one that sends
/// nothing at all.
pub async fn serve(
    listener: TcpListener,
    router: Router,
    header_time: Duration,
    stop: impl Future<Output = ()>,
) {
    let connections = GracefulShutdown::new();
    let mut http = http1::Builder::new();
    http.timer(TokioTimer::new()).header_read_timeout(header_time);
    let mut stop = std::pin::pin!(stop);
    loop {
        let accepted = tokio::select! {
            accepted = listener.accept() => accepted,
            () = &mut stop => break,
        };
        let stream = match accepted {
            Ok((stream, _)) => stream,
            Err(fault) => {
                // Too many open files, for example: it gets better when others end.
                warn!(%fault, "a connection was not accepted");
                tokio::time::sleep(Duration::from_millis(100)).await;
                continue;
            }
        };
        // An event of a stream must not wait for the next one to fill a packet.
        if let Err(fault) = stream.set_nodelay(true) {
            debug!(%fault, "a connection is gone before it began");
            continue;
        }
        let service = TowerToHyperService::new(router.clone());
        let connection = connections.watch(http.serve_connection(TokioIo::new(stream), service));
        tokio::spawn(async move {
            if let Err(fault) = connection.await {
                debug!(%fault, "a connection ended badly");
            }
        });
    }
    drop(listener);
    connections.shutdown().await;
}
