//! The way out, and connections that dawdle.

use std::{
    io::{BufRead, BufReader, Read, Write},
    process::{Command, Stdio},
    sync::{Arc, Mutex},
    time::Duration,
};

use futures_util::StreamExt;
use serde_json::{Value, json};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
};

use super::harness::{chat, start_with};
use super::stub::{before, event_stream, upstream};

#[tokio::test(flavor = "multi_thread")]
async fn a_stream_under_way_is_served_to_its_end() {
    let (send, answer) = event_stream();
    let answer = Arc::new(Mutex::new(Some(answer)));
    let stub = upstream(move |_| {
        let answer = answer.lock().unwrap().take().unwrap();
        async move { answer }
    })
    .await;
    let running = before(&stub, |_| {}).await;
    let url = |path: &str| running.url(path);
    let (readyz, chats) = (url("/readyz"), url("/v1/chat/completions"));
    let body = json!({ "model": "base", "stream": true, "messages": [{ "role": "user", "content": "?" }] });
    let mut stream = running.client.post(&chats).json(&body).send().await.unwrap().bytes_stream();
    let piece = |text: &str| {
        format!("data: {{\"choices\":[{{\"index\":0,\"delta\":{{\"content\":\"{text}\"}}}}]}}\n\n")
    };
    send.send(Ok(piece("a").into())).await.unwrap();
    assert_eq!(stream.next().await.unwrap().unwrap(), piece("a"));
    assert_eq!(running.client.get(&readyz).send().await.unwrap().status(), 200);

    let (store, life) = (Arc::clone(&running.app.state.store), Arc::clone(&running.app.state.life));
    let stopping = tokio::spawn(running.app.stop(Duration::from_secs(30)));
    while !life.is_draining() {
        tokio::task::yield_now().await;
    }
    // New clients are told to go elsewhere, and so is whoever asks whether they should come.
    let fresh = reqwest::Client::new();
    assert_eq!(fresh.get(&readyz).send().await.unwrap().status(), 503);
    assert_eq!(fresh.get(readyz.replace("readyz", "healthz")).send().await.unwrap().status(), 200);
    let refused = fresh.post(&chats).json(&body).send().await.unwrap();
    assert_eq!((refused.status().as_u16(), &refused.headers()["retry-after"]), (503, &"1".parse().unwrap()));
    assert_eq!(refused.headers()["connection"], "close");
    assert!(!stopping.is_finished());

    send.send(Ok(piece("b").into())).await.unwrap();
    send.send(Ok("data: [DONE]\n\n".into())).await.unwrap();
    drop(send);
    let mut rest = Vec::new();
    while let Some(bytes) = stream.next().await {
        rest.extend_from_slice(&bytes.unwrap());
    }
    assert_eq!(String::from_utf8(rest).unwrap(), piece("b") + "data: [DONE]\n\n");
    tokio::time::timeout(Duration::from_secs(5), stopping).await.unwrap().unwrap();
    fresh.get(&readyz).send().await.unwrap_err();
    let kept: Vec<_> = store.completions(..).map(|kept| kept.unwrap().answer).collect();
    assert_eq!(kept, ["ab"]);
}

#[tokio::test(flavor = "multi_thread")]
async fn the_way_out_has_a_bound() {
    let (send, answer) = event_stream();
    let answer = Arc::new(Mutex::new(Some(answer)));
    let stub = upstream(move |_| {
        let answer = answer.lock().unwrap().take().unwrap();
        async move { answer }
    })
    .await;
    let running = before(&stub, |_| {}).await;
    let url = running.url("/v1/chat/completions");
    let _endless = running.client.post(url).json(&chat("chat", 1)).send().await.unwrap();
    let stopped = running.app.stop(Duration::from_millis(200));
    tokio::time::timeout(Duration::from_secs(10), stopped).await.unwrap();
    drop(send);
}

/// The real program, as its container runs it.
#[test]
fn the_log_is_json_and_says_nothing_of_what_was_said() {
    let dir = tempfile::tempdir().unwrap();
    gyrostat::policy::write_tiny(&dir.path().join("tiny"), 0).unwrap();
    let mut command = Command::new(env!("CARGO_BIN_EXE_gyrostat"));
    command.arg("serve").current_dir(dir.path()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let settings = [
        ("LOG__FORMAT", "json"),
        ("HTTP__BIND", "127.0.0.1:0"),
        ("STORE__PATH", "data"),
        ("POLICY__MODEL", "tiny"),
    ];
    command.envs(settings.map(|(key, value)| (format!("GYROSTAT_{key}"), value))).env_remove("RUST_LOG");
    let mut server = command.spawn().unwrap();
    let mut said = String::new();
    BufReader::new(server.stdout.take().unwrap()).read_line(&mut said).unwrap();
    let address = said.trim().rsplit("http://").next().unwrap().to_owned();
    let send = |request: String| {
        let mut connection = std::net::TcpStream::connect(&address).unwrap();
        connection.write_all(request.as_bytes()).unwrap();
        let mut answer = String::new();
        connection.read_to_string(&mut answer).unwrap();
        answer
    };
    let body = chat("chat", 1).to_string();
    let head = format!("host: a\r\nconnection: close\r\nx-request-id: abc\r\ncontent-length: {}", body.len());
    assert!(
        send(format!("POST /v1/chat/completions HTTP/1.1\r\n{head}\r\n\r\n{body}"))
            .starts_with("HTTP/1.1 200")
    );
    send("GET /secret-path HTTP/1.1\r\nhost: a\r\nconnection: close\r\n\r\n".to_owned());
    send("GET /healthz HTTP/1.1\r\nhost: a\r\nconnection: close\r\n\r\n".to_owned());
    assert!(Command::new("kill").arg(server.id().to_string()).status().unwrap().success());
    let mut log = String::new();
    server.stderr.take().unwrap().read_to_string(&mut log).unwrap();
    assert!(server.wait().unwrap().success(), "{log}");

    let lines: Vec<Value> = log.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    let access: Vec<&Value> = lines.iter().filter(|line| line["target"] == "gyrostat::access").collect();
    assert_eq!(access.len(), 2, "{log}");
    let line = access[0];
    assert_eq!(
        (&line["method"], &line["route"], &line["status"]),
        (&json!("POST"), &json!("/v1/chat/completions"), &json!(200))
    );
    assert_eq!(
        (&line["request_id"], &line["model"], &line["version"]),
        (&json!("abc"), &json!("tiny"), &json!("v0"))
    );
    assert!(
        line["input_tokens"].as_u64().unwrap() > 0 && line["output_tokens"].as_u64().unwrap() <= 8,
        "{line}"
    );
    assert!(line["seconds"].as_f64().unwrap() > 0.0, "{line}");
    assert_eq!((&access[1]["route"], &access[1]["status"]), (&json!("other"), &json!(404)));
    assert!(!log.contains("question") && !log.contains("secret-path"), "{log}");
}

#[tokio::test(flavor = "multi_thread")]
async fn slow_headers_are_not_waited_for() {
    let running = start_with(|config| config.http.header_seconds = 0.3).await;
    let mut connection = TcpStream::connect(running.app.address).await.unwrap();
    connection.write_all(b"GET /healthz HTTP/1.1\r\nhost: a\r\n").await.unwrap();
    let mut answer = Vec::new();
    let closed = tokio::time::timeout(Duration::from_secs(10), connection.read_to_end(&mut answer));
    // Whether it is told so or just cut off is all the same; it gets no answer.
    let _cut = closed.await.unwrap();
    assert!(!answer.starts_with(b"HTTP/1.1 200"), "{}", String::from_utf8_lossy(&answer));
    assert_eq!(running.client.get(running.url("/healthz")).send().await.unwrap().status(), 200);
}
