// net/http with mattn/go-sqlite3 as an expert writes it: one goroutine writes all messages that wait in one transaction.
package main

import (
	"crypto/subtle"
	"database/sql"
	"encoding/json"
	"io"
	"log"
	"net/http"
	"os"

	"github.com/mattn/go-sqlite3"
)

type waiting struct {
	body   string
	stored chan int64 // its id, or 0 if a rule refused it
}

func write(db *sql.DB, insert *sql.Stmt, queue <-chan waiting) {
	for first := range queue {
		group := []waiting{first}
		for len(queue) > 0 {
			group = append(group, <-queue)
		}
		ids := make([]int64, len(group))
		tx, err := db.Begin()
		if err != nil {
			log.Fatal(err)
		}
		inTransaction := tx.Stmt(insert)
		for n, one := range group {
			if result, err := inTransaction.Exec("default", one.body); err == nil {
				ids[n], _ = result.LastInsertId()
			} else if err.(sqlite3.Error).Code != sqlite3.ErrConstraint {
				log.Fatal(err)
			}
		}
		if err := tx.Commit(); err != nil {
			log.Fatal(err)
		}
		for n, one := range group {
			one.stored <- ids[n]
		}
	}
}

func main() {
	db, err := sql.Open("sqlite3", os.Getenv("BENCH_DATABASE")+"?_journal_mode=WAL&_synchronous=FULL&_txlock=immediate")
	if err != nil {
		log.Fatal(err)
	}
	db.SetMaxOpenConns(1)
	insert, err := db.Prepare("INSERT INTO messages (received_at, client, body) VALUES (datetime('now'), ?, ?)")
	if err != nil {
		log.Fatal(err)
	}
	queue := make(chan waiting, 1000)
	go write(db, insert, queue)
	http.HandleFunc("POST /messages", func(w http.ResponseWriter, r *http.Request) {
		token := []byte(r.Header.Get("Authorization"))
		if subtle.ConstantTimeCompare(token, []byte("Bearer bench-secret")) != 1 {
			http.Error(w, "unauthorized", http.StatusUnauthorized)
			return
		}
		body, err := io.ReadAll(r.Body)
		if err != nil || !json.Valid(body) {
			http.Error(w, "not JSON", http.StatusBadRequest)
			return
		}
		one := waiting{string(body), make(chan int64, 1)}
		queue <- one
		id := <-one.stored
		if id == 0 {
			http.Error(w, "refused", http.StatusUnprocessableEntity)
			return
		}
		w.Header().Set("Content-Type", "application/json")
		w.WriteHeader(http.StatusCreated)
		json.NewEncoder(w).Encode(map[string]int64{"id": id})
	})
	log.Fatal(http.ListenAndServe("127.0.0.1:"+os.Getenv("BENCH_PORT"), nil))
}
