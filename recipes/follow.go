// Prints each message of a stream, for ever, byte for byte: BASE=http://127.0.0.1:8080 TOKEN=… go run follow.go readings 0
package main

import (
	"encoding/json"
	"fmt"
	"log"
	"net/http"
	"os"
	"strconv"
	"time"
)

func main() {
	// The last argument is the id of the last message that was dealt with: keep it with the results.
	address := os.Getenv("BASE") + "/" + os.Args[1] + "?wait=30&limit=1000&after=" + os.Args[2]
	client := http.Client{Timeout: time.Minute}
	for {
		var page struct {
			Messages []json.RawMessage
			Next     string
		}
		pause := 1
		request, err := http.NewRequest("GET", address, nil)
		if err != nil {
			log.Fatal(err)
		}
		request.Header.Set("Authorization", "Bearer "+os.Getenv("TOKEN"))
		if answer, err := client.Do(request); err == nil {
			if code := answer.StatusCode; code >= 400 && code < 500 && code != 408 && code != 429 {
				log.Fatal(answer.Status)
			}
			if seconds, err := strconv.Atoi(answer.Header.Get("Retry-After")); err == nil {
				pause = seconds
			}
			if answer.StatusCode == 200 && json.NewDecoder(answer.Body).Decode(&page) == nil {
				if next, err := request.URL.Parse(page.Next); err == nil {
					address = next.String()
				}
				for _, message := range page.Messages {
					fmt.Printf("%s\n", message)
				}
			}
			answer.Body.Close()
		}
		if len(page.Messages) == 0 {
			time.Sleep(time.Duration(pause) * time.Second)
		}
	}
}
