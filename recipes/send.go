// Sends each line of stdin, which is JSON, until it is on disk, and prints its id:
// BASE=http://127.0.0.1:8080 TOKEN=… go run send.go readings < lines
package main

import (
	"bufio"
	"bytes"
	"crypto/rand"
	"encoding/json"
	"fmt"
	"io"
	"log"
	"net/http"
	"os"
	"strconv"
	"time"
)

var client = http.Client{Timeout: time.Minute}

// send returns the id of a message. The key makes it safe to send again when the outcome is unknown.
func send(url, token string, body []byte) (int64, error) {
	key := make([]byte, 16)
	rand.Read(key)
	for pause := 100 * time.Millisecond; ; pause = min(2*pause, 30*time.Second) {
		request, err := http.NewRequest("POST", url, bytes.NewReader(body))
		if err != nil {
			return 0, err
		}
		request.Header.Set("Authorization", "Bearer "+token)
		request.Header.Set("Content-Type", "application/json")
		request.Header.Set("Idempotency-Key", fmt.Sprintf("%x", key))
		wait := pause
		if answer, err := client.Do(request); err == nil {
			text, err := io.ReadAll(answer.Body)
			answer.Body.Close()
			code := answer.StatusCode
			var stored struct{ ID int64 }
			if code == 201 && err == nil && json.Unmarshal(text, &stored) == nil {
				return stored.ID, nil
			}
			if code >= 400 && code < 500 && code != 408 && code != 425 && code != 429 {
				return 0, fmt.Errorf("%s", text)
			}
			if seconds, err := strconv.Atoi(answer.Header.Get("Retry-After")); err == nil {
				wait = time.Duration(seconds) * time.Second
			}
		}
		time.Sleep(wait)
	}
}

func main() {
	lines, status := bufio.NewReader(os.Stdin), 0
	for {
		line, err := lines.ReadBytes('\n')
		if line = bytes.TrimSpace(line); len(line) > 0 {
			id, err := send(os.Getenv("BASE")+"/"+os.Args[1], os.Getenv("TOKEN"), line)
			if err != nil {
				log.Printf("refused: %.100s: %s", line, err)
				status = 1
			} else {
				fmt.Println(id)
			}
		}
		if err == io.EOF {
			os.Exit(status)
		} else if err != nil {
			log.Fatal(err)
		}
	}
}
