"""WordPress from Debian, with php-fpm, MariaDB and nginx, each as Debian configures it; one REST insert is one post.

It needs the packages wordpress, php-fpm, php-mysql, mariadb-server and nginx, and root. Everything that it writes is beside
BENCH_DATABASE; the application password goes into the file BENCH_TOKEN.
"""

import base64
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

FOLDER = Path(os.environ["BENCH_DATABASE"] + ".wordpress")
SITE = FOLDER / "site"
SOCKET = FOLDER / "mariadb.socket"
PHP_FPM = str(max(Path("/usr/sbin").glob("php-fpm*")))

# Nothing is asked of other machines: no updates, no jobs of its own.
WP_CONFIG = f"""<?php
define('DB_NAME', 'wordpress'); define('DB_USER', 'root'); define('DB_PASSWORD', '');
define('DB_HOST', 'localhost:{SOCKET}'); define('DB_CHARSET', 'utf8mb4'); define('DB_COLLATE', '');
define('WP_ENVIRONMENT_TYPE', 'local'); // application passwords without TLS
define('WP_HTTP_BLOCK_EXTERNAL', true); define('DISABLE_WP_CRON', true);
$table_prefix = 'wp_';
if (!defined('ABSPATH')) define('ABSPATH', __DIR__ . '/');
require_once ABSPATH . 'wp-settings.php';
"""
INSTALL = """<?php
define('WP_INSTALLING', true);
$_SERVER['HTTP_HOST'] = '127.0.0.1:' . getenv('BENCH_PORT');
require 'wp-load.php';
require ABSPATH . 'wp-admin/includes/upgrade.php';
function wp_new_blog_notification() {} // it would send mail
wp_install('bench', 'bench', 'bench@example.com', false, '', 'bench-secret');
echo WP_Application_Passwords::create_new_application_password(1, ['name' => 'bench'])[0];
"""
# What Debian's pool.d/www.conf has.
POOL = f"""
[global]
error_log = {FOLDER}/php-fpm.log
[www]
user = root
listen = {FOLDER}/php.socket
pm = dynamic
pm.max_children = 5
pm.start_servers = 2
pm.min_spare_servers = 1
pm.max_spare_servers = 3
"""
NGINX = f"""
user root; worker_processes auto; pid {FOLDER}/nginx.pid; daemon off;
events {{ worker_connections 768; }}
http {{
  access_log off; client_body_temp_path {FOLDER}; fastcgi_temp_path {FOLDER}; proxy_temp_path {FOLDER};
  uwsgi_temp_path {FOLDER}; scgi_temp_path {FOLDER};
  server {{
    listen 127.0.0.1:{os.environ["BENCH_PORT"]}; root {SITE};
    location / {{ include /etc/nginx/fastcgi_params; fastcgi_param SCRIPT_FILENAME {SITE}/index.php;
      fastcgi_pass unix:{FOLDER}/php.socket; }}
  }}
}}
"""


def main():
    FOLDER.mkdir()
    shutil.copytree("/usr/share/wordpress", SITE)
    (SITE / "wp-config.php").unlink()
    for name, text in {
        "site/wp-config.php": WP_CONFIG,
        "site/install.php": INSTALL,
        "pool.conf": POOL,
        "nginx.conf": NGINX,
    }.items():
        (FOLDER / name).write_text(text)
    data = ["--no-defaults", "--user=root", f"--datadir={FOLDER}/data"]
    subprocess.run(["mariadb-install-db", *data, "--skip-test-db"], check=True, stdout=subprocess.DEVNULL)
    servers = [subprocess.Popen(["mariadbd", *data, f"--socket={SOCKET}", "--skip-networking"])]
    create = ["mariadb", "--no-defaults", f"--socket={SOCKET}", "-e", "CREATE DATABASE wordpress"]
    while subprocess.run(create, stderr=subprocess.DEVNULL).returncode:
        time.sleep(0.1)
    password = subprocess.run(["php", "install.php"], cwd=SITE, check=True, stdout=subprocess.PIPE, text=True).stdout
    servers.append(subprocess.Popen([PHP_FPM, "--nodaemonize", "--allow-to-run-as-root", "-y", FOLDER / "pool.conf"]))
    servers.append(subprocess.Popen(["nginx", "-c", FOLDER / "nginx.conf", "-e", FOLDER / "nginx.log"]))
    credentials = base64.b64encode(f"bench:{password.split()[-1]}".encode()).decode()
    Path(os.environ["BENCH_TOKEN"]).write_text(f"Basic {credentials}")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit())
    for server in servers:
        server.wait()


if __name__ == "__main__":
    main()
