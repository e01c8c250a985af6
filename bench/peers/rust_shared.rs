// axum with rusqlite as an expert writes it: a thread of its own writes all messages that wait in one transaction.
use std::sync::mpsc;

use axum::{Json, Router, extract::State, http::{HeaderMap, StatusCode}, routing::post};
use rusqlite::{Connection, ErrorCode, Statement};
use serde::de::IgnoredAny;
use serde_json::{Value, json};
use tokio::sync::oneshot;

type Waiting = (String, oneshot::Sender<Option<i64>>); // the id, or None if a rule refused it
const INSERT: &str = "INSERT INTO messages (received_at, client, body) VALUES (datetime('now'), ?, ?)";

fn insert_one(insert: &mut Statement, body: &str) -> Option<i64> {
    match insert.insert(("default", body)) {
        Ok(id) => Some(id),
        Err(error) if error.sqlite_error_code() == Some(ErrorCode::ConstraintViolation) => None,
        Err(error) => panic!("{error}"),
    }
}

fn write(db: Connection, queue: mpsc::Receiver<Waiting>) {
    let mut insert = db.prepare(INSERT).unwrap();
    while let Ok(first) = queue.recv() {
        let group: Vec<Waiting> = std::iter::once(first).chain(queue.try_iter()).collect();
        db.execute_batch("BEGIN IMMEDIATE").unwrap();
        let ids: Vec<Option<i64>> = group.iter().map(|(body, _)| insert_one(&mut insert, body)).collect();
        db.execute_batch("COMMIT").unwrap();
        for ((_, sender), id) in group.into_iter().zip(ids) {
            let _ = sender.send(id); // the client may have gone
        }
    }
}

async fn create(State(queue): State<mpsc::Sender<Waiting>>, headers: HeaderMap, body: String) -> (StatusCode, Json<Value>) {
    if headers.get("authorization").is_none_or(|token| token != "Bearer bench-secret") {
        return (StatusCode::UNAUTHORIZED, Json(json!({"title": "Unauthorized"})));
    }
    if serde_json::from_str::<IgnoredAny>(&body).is_err() {
        return (StatusCode::BAD_REQUEST, Json(json!({"title": "Not JSON"})));
    }
    let (sender, stored) = oneshot::channel();
    queue.send((body, sender)).unwrap();
    match stored.await.unwrap() {
        Some(id) => (StatusCode::CREATED, Json(json!({"id": id}))),
        None => (StatusCode::UNPROCESSABLE_ENTITY, Json(json!({"title": "Refused"}))),
    }
}

#[tokio::main]
async fn main() {
    let db = Connection::open(std::env::var("BENCH_DATABASE").unwrap()).unwrap();
    db.execute_batch("PRAGMA journal_mode = WAL; PRAGMA synchronous = FULL").unwrap();
    let (queue, receiver) = mpsc::channel();
    std::thread::spawn(move || write(db, receiver));
    let app = Router::new().route("/messages", post(create)).with_state(queue);
    let address = format!("127.0.0.1:{}", std::env::var("BENCH_PORT").unwrap());
    let listener = tokio::net::TcpListener::bind(address).await.unwrap();
    axum::serve(listener, app).await.unwrap();
}
