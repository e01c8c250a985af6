// PocketBase with a collection that only a user may write to. With the argument full, all of its connections have
// synchronous=FULL; without it, PocketBase opens them as it comes (NORMAL).
package main

import (
	"log"
	"os"

	"github.com/pocketbase/dbx"
	"github.com/pocketbase/pocketbase"
	"github.com/pocketbase/pocketbase/core"
	"github.com/pocketbase/pocketbase/tools/types"
)

const pragmas = "?_pragma=busy_timeout(10000)&_pragma=journal_mode(WAL)&_pragma=journal_size_limit(200000000)" +
	"&_pragma=foreign_keys(ON)&_pragma=temp_store(MEMORY)&_pragma=cache_size(-32000)&_pragma=synchronous(FULL)"

// prepare makes the collection and a user, and writes the user's token to the file of BENCH_TOKEN.
func prepare(event *core.ServeEvent) error {
	event.InstallerFunc = nil // it would open a browser
	messages := core.NewBaseCollection("messages")
	messages.Fields.Add(&core.JSONField{Name: "body", Required: true})
	messages.CreateRule = types.Pointer("@request.auth.id != ''")
	if err := event.App.Save(messages); err != nil {
		return err
	}
	users, err := event.App.FindCollectionByNameOrId("users")
	if err != nil {
		return err
	}
	user := core.NewRecord(users)
	user.SetEmail("bench@example.com")
	user.SetPassword("bench-secret")
	if err := event.App.Save(user); err != nil {
		return err
	}
	token, err := user.NewAuthToken()
	if err != nil {
		return err
	}
	if err := os.WriteFile(os.Getenv("BENCH_TOKEN"), []byte(token), 0o600); err != nil {
		return err
	}
	return event.Next()
}

func main() {
	config := pocketbase.Config{DefaultDataDir: os.Getenv("BENCH_DATABASE") + ".pocketbase", HideStartBanner: true}
	if len(os.Args) > 1 && os.Args[1] == "full" {
		config.DBConnect = func(path string) (*dbx.DB, error) { return dbx.Open("sqlite", path+pragmas) }
	}
	os.Args = []string{os.Args[0], "serve", "--http=127.0.0.1:" + os.Getenv("BENCH_PORT")} // PocketBase reads them itself
	app := pocketbase.NewWithConfig(config)
	app.OnServe().BindFunc(prepare)
	if err := app.Start(); err != nil {
		log.Fatal(err)
	}
}
