"""The CloudEvents SDK with requests: python cloudevents_sender.py binary|structured N

pip install cloudevents requests. In binary mode, datacontenttype is needed, and a stream with a column `headers` keeps
the ce- headers. The id of the event is its key, so that it can be sent again.
"""

import os
import sys

import requests
from cloudevents.core.bindings.http import to_binary_event, to_structured_event
from cloudevents.core.v1.event import CloudEvent
from requests.adapters import HTTPAdapter
from urllib3.util import Retry

session = requests.Session()
session.headers["Authorization"] = f"Bearer {os.environ['INLET_TOKEN']}"
# Without allowed_methods, a POST is not tried again.
tries = Retry(total=30, allowed_methods=None, status_forcelist=[502, 503, 504], backoff_factor=0.5, backoff_max=5)
session.mount("http://", HTTPAdapter(max_retries=tries))
to_message = {"binary": to_binary_event, "structured": to_structured_event}[sys.argv[1]]
for n in range(int(sys.argv[2])):
    attributes = {"type": "com.example.reading", "source": "/sensors", "datacontenttype": "application/json"}
    event = CloudEvent(attributes, {"n": n})
    message = to_message(event)
    headers = {**message.headers, "Idempotency-Key": event.get_id()}
    answer = session.post(os.environ["INLET_URL"], data=message.body, headers=headers, timeout=30)
    answer.raise_for_status()
