"""Clients that other people have written. Each takes URL, FILE and AUTHORIZATION, posts the file, and prints the status on
a line of its own, and then the body of the answer.
"""

import sys
from pathlib import Path

URLLIB = """
import sys, urllib.error, urllib.request
url, file, authorization = sys.argv[1:]
headers = {"Authorization": authorization, "Content-Type": "application/json"}
try:
    answer = urllib.request.urlopen(urllib.request.Request(url, open(file, "rb").read(), headers))
except urllib.error.HTTPError as error:
    answer = error
print(answer.status, answer.read().decode(), sep="\\n")
"""
HTTP_CLIENT = """
import http.client, sys, urllib.parse
url, file, authorization = sys.argv[1:]
parts = urllib.parse.urlsplit(url)
connection = http.client.HTTPConnection(parts.netloc)
headers = {"Authorization": authorization, "Content-Type": "application/json"}
connection.request("POST", parts.path, open(file, "rb").read(), headers)
answer = connection.getresponse()
print(answer.status, answer.read().decode(), sep="\\n")
"""
CURL = """
curl -sS -o "$2.answer" -w '%{http_code}\\n' -H "Authorization: $3" -H "Content-Type: application/json" $0 --data-binary "@$2" "$1"
cat "$2.answer"
"""
NODE = """
const [url, file, authorization] = process.argv.slice(1);
const headers = {"Authorization": authorization, "Content-Type": "application/json"};
const body = require("fs").readFileSync(file);
const show = (status, text) => console.log(status + "\\n" + text);
"""
NODE_HTTP = """
const request = require("http").request(url, {method: "POST", headers}, (answer) => {
    let text = "";
    answer.on("data", (data) => { text += data; }).on("end", () => show(answer.statusCode, text));
});
request.end(body);
"""
NODE_FETCH = """
fetch(url, {method: "POST", headers, body}).then(async (answer) => show(answer.status, await answer.text()));
"""
GO = """
package main

import ("bytes"; "fmt"; "io"; "net/http"; "os")

func main() {
	body, _ := os.ReadFile(os.Args[2])
	request, _ := http.NewRequest("POST", os.Args[1], bytes.NewReader(body))
	request.Header.Set("Authorization", os.Args[3])
	request.Header.Set("Content-Type", "application/json")
	answer, err := http.DefaultClient.Do(request)
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
	text, _ := io.ReadAll(answer.Body)
	fmt.Printf("%d\\n%s\\n", answer.StatusCode, text)
}
"""


def commands(folder: Path) -> dict[str, list]:
    """The command of each client, by its name; a folder for what has to be compiled."""
    (folder / "post.go").write_text(GO)
    return {
        "urllib": [sys.executable, "-c", URLLIB],
        "http.client": [sys.executable, "-c", HTTP_CLIENT],
        "curl": ["sh", "-ec", CURL, "-sS"],
        "curl that does not wait for 100": ["sh", "-ec", CURL, "-HExpect:"],
        "node's http": ["node", "-e", NODE + NODE_HTTP],
        "node's fetch": ["node", "-e", NODE + NODE_FETCH],
        "Go": ["go", "run", folder / "post.go"],
    }
