"""What is new in a stream, into DuckDB by dlt: pip install "dlt[duckdb]==1.31.0"; python dlt_pipeline.py readings

Its paginators json_link, header_link and auto would never end, for the feed always has a `next`. A cursor ends at
the empty page. BASE is the address of the service, and TOKEN may read. dlt rounds decimals, and refuses whole numbers
of more than 64 bits.
"""

import os
import sys

import dlt
from dlt.sources.rest_api import rest_api_source

stream = sys.argv[1]
source = rest_api_source(
    {
        "client": {
            "base_url": os.environ["BASE"],
            "auth": {"type": "bearer", "token": os.environ["TOKEN"]},
            "paginator": {"type": "cursor", "cursor_path": "messages[-1].id", "cursor_param": "after"},
        },
        "resources": [
            {
                "name": stream,
                "columns": {"body": {"data_type": "json"}},
                "endpoint": {
                    "path": stream,
                    "params": {"limit": 1000},
                    "data_selector": "messages",
                    "incremental": {"cursor_path": "id", "start_param": "after", "initial_value": 0},
                },
            }
        ],
    }
)
# Its name must differ from that of the dataset.
print(dlt.pipeline("inlet", destination="duckdb", dataset_name="feed").run(source))
