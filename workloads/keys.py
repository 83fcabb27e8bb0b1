"""API keys: who may ask a deployment, and when one is required.

Only their SHA-256 hashes leave the command that reads them: keys are long and random, so a slow
hash would gain nothing.
"""

import hashlib
import hmac
import ipaddress
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from .config import TargetServe, UserError

VARIABLE = "WORKLOADS_API_KEYS"
SHORTEST = 16  # characters
_HASH = re.compile(r"sha256:([0-9a-f]{64})", re.I)
_MAKE = "openssl rand -hex 32"


class Access(NamedTuple):
    """Who may ask: whoever has a key with one of these hashes; everybody where there is none."""

    hashes: list[str] = []  # SHA-256, hexadecimal
    insecure: bool = False  # nobody needs a key, though everybody can reach it


EVERYBODY = Access()


def read(limits: TargetServe, environment: Mapping[str, str] = os.environ) -> list[str]:
    """Hashes of the keys in the environment (separated by commas or spaces) and in
    serve.api_keys_file (one a line; # begins a comment, at the start or after a space);
    `sha256:HEX` stands for a key whose hash that is. Raises UserError."""
    given = [(VARIABLE, key) for key in re.split(r"[,\s]+", environment.get(VARIABLE, "")) if key]
    if limits.api_keys_file is not None:
        where = f"target.serve.api_keys_file {limits.api_keys_file}"
        try:
            text = Path(limits.api_keys_file).expanduser().read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as e:
            raise UserError(f"{where}: cannot be read: {e}") from None
        lines = [re.split(r"(?:^|\s)#", line)[0].strip() for line in text.splitlines()]
        if not any(lines):
            raise UserError(f"{where}: there is no key in it. Make one: {_MAKE}")
        given += [(where, line) for line in lines if line]
    return list(dict.fromkeys(_hash(where, key) for where, key in given))


def _hash(where: str, key: str) -> str:
    if found := _HASH.fullmatch(key):
        return found[1].lower()
    # What a header cannot carry could never be sent. The message does not repeat the key.
    if len(key) < SHORTEST or not re.fullmatch(r"[!-~]+", key) or key.lower().startswith("sha256:"):
        raise UserError(
            f"{where}: a key has {SHORTEST} or more characters, all ASCII and without spaces, or "
            f"is sha256: and 64 digits. Make one: {_MAKE}"
        )
    return hashlib.sha256(key.encode()).hexdigest()


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches what listens there."""
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return host == "localhost"


def check(host: str, access: Access) -> None:
    """Raises UserError where everybody could ask and nobody has said that this is meant."""
    if not is_loopback(host) and not access.hashes and not access.insecure:
        raise UserError(
            f"serve.host is {host}, where everybody who reaches the machine could ask, and there "
            f'is no API key. Make one (export {VARIABLE}="$({_MAKE})"; or '
            "target.serve.api_keys_file=FILE, one a line), listen on 127.0.0.1, or let everybody "
            "in: --insecure (in a Serve config file args: insecure: true)"
        )


def admits(hashes: list[bytes], authorization: bytes) -> int:
    """The number of the key, from 1 on, that an Authorization header has, in a time that does not
    tell which; 0 for none."""
    scheme, _, key = authorization.partition(b" ")
    digest = hashlib.sha256(key.strip()).hexdigest().encode()
    found = [hmac.compare_digest(digest, one) for one in hashes]
    number = sum(i for i, same in enumerate(found, 1) if same)
    return number if scheme.lower() == b"bearer" else 0
