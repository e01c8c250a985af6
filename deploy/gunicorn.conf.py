"""gunicorn -c deploy/gunicorn.conf.py service:application   (settings: INLET_DATABASE … in the environment)"""

bind = "127.0.0.1:8080"
workers = 2
threads = 16  # each message waits in one of them for its COMMIT, which the others share
worker_class = "gthread"
preload_app = False  # either works: the database is opened by the first request in a process
timeout = 60
graceful_timeout = 15
