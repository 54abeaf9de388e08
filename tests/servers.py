"""Real servers on loopback, each a context manager: started in the foreground with its own temporary folder and a
free port, stopped by process id. A missing program is an error, never a skip.

Programs and the Debian packages they come from: nginx (nginx-light), vsftpd (vsftpd), sshd, ssh-keygen and
sftp-server (openssh-server, openssh-sftp-server), tinyproxy (tinyproxy-bin), microsocks (microsocks).
"""

from __future__ import annotations

import contextlib
import os
import pwd
import shutil
import socket
import ssl
import subprocess
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import trustme

HOST = "127.0.0.1"
START_TIMEOUT = 15.0  # seconds until a server must accept connections
STOP_TIMEOUT = 5.0  # seconds from SIGTERM to SIGKILL


class ServerError(RuntimeError):
    """A server is not installed or did not start; the message holds its log."""


@dataclass(frozen=True)
class Server:
    """A running server. `home` holds its configuration and logs, `root` the files it serves."""

    port: int
    pid: int
    home: Path
    root: Path
    files: dict[str, Path] = field(default_factory=dict)

    @property
    def authority(self) -> str:
        return f"{HOST}:{self.port}"

    def log(self) -> str:
        """What the server has written so far."""
        texts = [path.read_text(errors="replace") for path in sorted(self.home.glob("*.log"))]
        return "\n".join(texts)


@dataclass(frozen=True)
class Certificates:
    """A throw-away authority and a certificate for `localhost` and 127.0.0.1 signed by it (PEM paths)."""

    authority: Path
    certificate: Path
    key: Path
    client: Path  # client certificate and key in one file

    def server_context(self) -> ssl.SSLContext:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(self.certificate, self.key)
        return context


def make_certificates(folder: Path) -> Certificates:
    """Write a fresh set of certificates into `folder`."""
    authority = trustme.CA()
    server = authority.issue_cert("localhost", HOST, "pinned.test")
    client = authority.issue_cert("client.test")
    made = Certificates(folder / "ca.pem", folder / "cert.pem", folder / "key.pem", folder / "client.pem")
    authority.cert_pem.write_to_path(str(made.authority))
    for blob in server.cert_chain_pems:
        blob.write_to_path(str(made.certificate), append=True)
    server.private_key_pem.write_to_path(str(made.key))
    client.private_key_and_cert_chain_pem.write_to_path(str(made.client))
    return made


def program(name: str) -> str:
    """Path of an installed program, the sbin folders included."""
    path = shutil.which(name, path=os.environ.get("PATH", "") + ":/usr/sbin:/sbin:/usr/local/sbin")
    if path is None:
        raise ServerError(f"{name} is not installed; see the list of Debian packages in {Path(__file__).name}")
    return path


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        return int(probe.getsockname()[1])


def old_file(folder: Path, name: str, content: bytes) -> Path:
    """Makes `folder`, which servers of any user may read, with one file in it; gives the folder. The file is old enough
    for its date to name a version."""
    folder.mkdir()
    (folder / name).write_bytes(content)
    os.utime(folder / name, (1_700_000_000, 1_700_000_000))
    for parent in (folder, *folder.parents[:3]):
        parent.chmod(0o755)
    return folder


@contextlib.contextmanager
def _running(argv: Sequence[str], port: int, home: Path, root: Path, **files: Path) -> Iterator[Server]:
    """Run `argv` until the block ends; entered once `port` accepts connections."""
    with (
        open(home / "output.log", "ab") as output,
        subprocess.Popen(argv, cwd=home, stdin=subprocess.DEVNULL, stdout=output, stderr=output) as process,
    ):
        server = Server(port, process.pid, home, root, dict(files))
        try:
            _wait_until_accepting(process, server)
            yield server
        finally:
            process.terminate()
            try:
                process.wait(STOP_TIMEOUT)
            except subprocess.TimeoutExpired:
                process.kill()


def _wait_until_accepting(process: subprocess.Popen[bytes], server: Server) -> None:
    deadline = time.monotonic() + START_TIMEOUT
    while True:
        if process.poll() is not None:
            raise ServerError(f"{process.args!r} ended with {process.returncode}:\n{server.log()}")
        try:
            socket.create_connection((HOST, server.port), 1).close()
            return
        except OSError as error:
            if time.monotonic() > deadline:
                raise ServerError(f"{process.args!r} accepts no connections:\n{server.log()}") from error
            # A server has no way to say that it listens: asking again is the only one.
            time.sleep(0.02)


@contextlib.contextmanager
def _home(root: Path | None) -> Iterator[tuple[Path, Path]]:
    with tempfile.TemporaryDirectory(prefix="streamfs-server-") as name:
        home = Path(name)
        home.chmod(0o755)
        served = root if root is not None else home / "root"
        served.mkdir(exist_ok=True)
        yield home, served


_NGINX = """
daemon off; master_process off; pid {home}/nginx.pid; error_log {home}/error.log notice;
events {{ worker_connections 2000; }}
http {{
  access_log {home}/access.log;
  client_body_temp_path {home}/body; proxy_temp_path {home}/proxy; fastcgi_temp_path {home}/fastcgi;
  uwsgi_temp_path {home}/uwsgi; scgi_temp_path {home}/scgi;
  types {{ audio/flac flac; text/plain txt; }} default_type application/octet-stream;
  sendfile on; keepalive_timeout 60s; {options}
  server {{ listen {host}:{port} {listen}; {tls} root {root};
    location /limited/ {{ alias {root}/; limit_rate 256k; }}
    {locations}
  }}
}}
"""


@contextlib.contextmanager
def nginx(
    root: Path | None = None,
    *,
    ranges: bool = True,
    tls: Certificates | None = None,
    http2: bool = False,
    client_certificates: bool = False,
    options: str = "",
    locations: str = "",
) -> Iterator[Server]:
    """nginx serving `root`; below /limited/ at 256 KiB/s. `options`: further directives of the http block,
    `locations`: of the server block."""
    with _home(root) as (home, served):
        port = free_port()
        listen, tls_lines = "", ""
        if tls is not None:
            listen = "ssl http2" if http2 else "ssl"
            tls_lines = f"ssl_certificate {tls.certificate}; ssl_certificate_key {tls.key};"
            if client_certificates:
                tls_lines += f" ssl_client_certificate {tls.authority}; ssl_verify_client on;"
        if not ranges:
            options += " max_ranges 0;"
        text = _NGINX.format(
            home=home,
            root=served,
            host=HOST,
            port=port,
            listen=listen,
            tls=tls_lines,
            options=options,
            locations=locations,
        )
        if os.geteuid() == 0:
            text = "user root;" + text
        (home / "nginx.conf").write_text(text)
        argv = [program("nginx"), "-p", str(home), "-e", str(home / "error.log"), "-c", str(home / "nginx.conf")]
        with _running(argv, port, home, served) as server:
            yield server


@contextlib.contextmanager
def vsftpd(
    root: Path | None = None, *, tls: Certificates | None = None, explicit: bool = False, rate: int = 0
) -> Iterator[Server]:
    """vsftpd for anonymous readers of `root`; every other login is refused. With `tls`: implicit TLS (ftps), or
    `explicit` (AUTH TLS), and nothing without it. `rate`: bytes a second of each session; 0: as fast as it can."""
    with _home(root) as (home, served):
        port = free_port()
        lines = [
            "listen=YES",
            f"listen_address={HOST}",
            f"listen_port={port}",
            "background=NO",
            "anonymous_enable=YES",
            "no_anon_password=YES",
            "local_enable=NO",
            "run_as_launching_user=YES",
            f"anon_root={served}",
            f"secure_chroot_dir={home}/empty",
            f"pasv_address={HOST}",
            "seccomp_sandbox=NO",
            "isolate=NO",
            "isolate_network=NO",
            "anon_world_readable_only=NO",
            "allow_writeable_chroot=YES",
            "xferlog_enable=YES",
            "log_ftp_protocol=YES",
            f"vsftpd_log_file={home}/vsftpd.log",
            f"ftp_username={pwd.getpwuid(os.geteuid()).pw_name}",
            "idle_session_timeout=60",
            f"anon_max_rate={rate}",
        ]
        if tls is not None:
            lines += [
                "ssl_enable=YES",
                f"implicit_ssl={'NO' if explicit else 'YES'}",
                "allow_anon_ssl=YES",
                "force_anon_data_ssl=YES",
                "force_anon_logins_ssl=YES",
                "ssl_tlsv1=YES",
                f"rsa_cert_file={tls.certificate}",
                f"rsa_private_key_file={tls.key}",
            ]
        (home / "empty").mkdir()
        (home / "vsftpd.conf").write_text("\n".join(lines) + "\n")
        with _running([program("vsftpd"), str(home / "vsftpd.conf")], port, home, served) as server:
            yield server


@contextlib.contextmanager
def sshd(root: Path | None = None) -> Iterator[Server]:
    """OpenSSH with the sftp subsystem only, for the user who runs it.

    `files`: "key" logs in, "stranger" is a key that does not, "host_key.pub" the host's public key,
    "known_hosts" knows it under 127.0.0.1, localhost and pinned.test."""
    with _home(root) as (home, served):
        port = free_port()
        for name in ("host_key", "key", "stranger"):
            argv = [program("ssh-keygen"), "-q", "-t", "ed25519", "-N", "", "-f", str(home / name)]
            subprocess.run(argv, check=True, stdin=subprocess.DEVNULL)
        shutil.copy(home / "key.pub", home / "authorized_keys")
        host_key = (home / "host_key.pub").read_text().split()
        known = "".join(f"[{host}]:{port} {host_key[0]} {host_key[1]}\n" for host in (HOST, "localhost", "pinned.test"))
        (home / "known_hosts").write_text(known)
        (home / "sshd_config").write_text(
            f"ListenAddress {HOST}:{port}\nHostKey {home}/host_key\nAuthorizedKeysFile {home}/authorized_keys\n"
            f"PidFile {home}/sshd.pid\nUsePAM no\nStrictModes no\nPasswordAuthentication no\n"
            "KbdInteractiveAuthentication no\nPermitRootLogin prohibit-password\nMaxAuthTries 20\n"
            "MaxStartups 100\nSubsystem sftp internal-sftp\nForceCommand internal-sftp\nLogLevel INFO\n"
        )
        if os.geteuid() == 0:
            Path("/run/sshd").mkdir(mode=0o755, exist_ok=True)  # sshd run by root insists on it
        argv = [program("sshd"), "-D", "-e", "-f", str(home / "sshd_config")]
        names = ("key", "stranger", "host_key.pub", "known_hosts")
        with _running(argv, port, home, served, **{name: home / name for name in names}) as server:
            yield server


@contextlib.contextmanager
def http_proxy(*, login: tuple[str, str] | None = None) -> Iterator[Server]:
    """tinyproxy: plain proxying and CONNECT, to any port; with `login` for that user and password only."""
    with _home(None) as (home, served):
        port = free_port()
        (home / "tinyproxy.conf").write_text(
            f'Port {port}\nListen {HOST}\nTimeout 60\nLogFile "{home}/tinyproxy.log"\nLogLevel Connect\n'
            f"MaxClients 50\nAllow {HOST}\nDisableViaHeader Yes\n"
            + (f"BasicAuth {login[0]} {login[1]}\n" if login is not None else "")
        )
        argv = [program("tinyproxy"), "-d", "-c", str(home / "tinyproxy.conf")]
        with _running(argv, port, home, served) as server:
            yield server


@contextlib.contextmanager
def socks_proxy() -> Iterator[Server]:
    """microsocks: SOCKS5 without authentication; its log names each connection."""
    with _home(None) as (home, served):
        port = free_port()
        with _running([program("microsocks"), "-i", HOST, "-p", str(port)], port, home, served) as server:
            yield server
