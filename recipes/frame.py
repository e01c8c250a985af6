"""Into pandas: python frame.py readings. BASE is the address of the service, and TOKEN may read.

Where some rows lack a member, pandas makes floats of its whole numbers: those above 2^53 are rounded.
"""

import json
import os
import sys
import urllib.request

import pandas


def frame(url, token):
    """A page of a stream or view, as a table: its columns are id, received_at, body.value and so on."""
    headers = {"Authorization": f"Bearer {token}", "Accept": "application/x-ndjson"}
    with urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=60) as answer:
        return pandas.json_normalize([json.loads(line) for line in answer])


def whole(url, token):
    """All of a stream. pandas.read_json would make numbers of texts, and fail on those above 2^64."""
    pages = [frame(f"{url}?limit=1000", token)]
    while len(pages[-1]):
        pages.append(frame(f"{url}?limit=1000&after={pages[-1]['id'].iloc[-1]}", token))
    return pandas.concat(pages, ignore_index=True)


if __name__ == "__main__":
    sys.set_int_max_str_digits(0)  # a number in a message may have more than 4,300 digits
    sys.stdout.reconfigure(errors="backslashreplace")  # and a text half of a surrogate pair
    print(whole(f"{os.environ['BASE']}/{sys.argv[1]}", os.environ["TOKEN"]).to_csv(index=False), end="")
