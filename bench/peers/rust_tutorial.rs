// axum with rusqlite as a tutorial has it: one connection behind a mutex, one COMMIT for each INSERT.
use std::sync::{Arc, Mutex};

use axum::{Json, Router, extract::State, http::StatusCode, routing::post};
use rusqlite::Connection;
use serde_json::{Value, json};

async fn create(State(db): State<Arc<Mutex<Connection>>>, Json(body): Json<Value>) -> (StatusCode, Json<Value>) {
    let id = tokio::task::spawn_blocking(move || {
        let db = db.lock().unwrap();
        db.prepare_cached("INSERT INTO messages (received_at, client, body) VALUES (datetime('now'), ?, ?)")
            .unwrap()
            .insert(("default", body.to_string()))
            .unwrap()
    })
    .await
    .unwrap();
    (StatusCode::CREATED, Json(json!({ "id": id })))
}

#[tokio::main]
async fn main() {
    let db = Connection::open(std::env::var("BENCH_DATABASE").unwrap()).unwrap();
    db.execute_batch("PRAGMA journal_mode = WAL; PRAGMA synchronous = FULL").unwrap();
    let app = Router::new().route("/messages", post(create)).with_state(Arc::new(Mutex::new(db)));
    let address = format!("127.0.0.1:{}", std::env::var("BENCH_PORT").unwrap());
    let listener = tokio::net::TcpListener::bind(address).await.unwrap();
    axum::serve(listener, app).await.unwrap();
}
