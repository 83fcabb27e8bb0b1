"""Who may ask a deployment."""

import hashlib
from pathlib import Path

import pytest

from workloads import keys
from workloads.cli import main
from workloads.config import TargetServe, UserError, load
from workloads.keys import Access

KEYS = ["first-of-the-keys-0001", "second-of-the-keys-002"]


def hashed(key: str) -> str:
    return hashlib.sha256(key.encode()).hexdigest()


def test_keys_come_from_the_environment_and_a_file_and_leave_hashed(tmp_path: Path) -> None:
    file = tmp_path / "keys"
    third, fourth = hashed("third").upper(), "a-key-with-a-#-in-it"
    file.write_text(f"# who has them\n{KEYS[0]}   # the shop\n\nsha256:{third}\n{fourth}\n")
    limits = TargetServe(api_keys_file=str(file))
    found = keys.read(limits, {"WORKLOADS_API_KEYS": f"{KEYS[1]}, {KEYS[0]}"})
    assert found == [hashed(KEYS[1]), hashed(KEYS[0]), hashed("third"), hashed(fourth)]


@pytest.mark.parametrize(
    "key", ["short", "with-\u00fcmlauts-in-the-key", "sha256:abcd", "SHA256:" + "g" * 64]
)
def test_a_key_that_would_never_work_is_refused_and_not_repeated(key: str) -> None:
    with pytest.raises(UserError, match="WORKLOADS_API_KEYS: a key has 16 or more") as e:
        keys.read(TargetServe(), {"WORKLOADS_API_KEYS": key})
    assert key not in str(e.value)


def test_a_file_without_keys_or_none_at_all_is_named(tmp_path: Path) -> None:
    empty = tmp_path / "empty"
    empty.write_text("# none yet\n")
    with pytest.raises(UserError, match="there is no key in it"):
        keys.read(TargetServe(api_keys_file=str(empty)), {})
    with pytest.raises(UserError, match="cannot be read"):
        keys.read(TargetServe(api_keys_file=str(tmp_path / "none")), {})


@pytest.mark.parametrize(
    ("host", "alone"),
    [
        *[(host, True) for host in ("127.0.0.1", "127.9.9.9", "::1", "[::1]", "localhost")],
        *[(host, False) for host in ("0.0.0.0", "::", "10.77.0.1", "example.org", "")],
    ],
)
def test_beyond_loopback_a_key_is_required(host: str, alone: bool) -> None:
    assert keys.is_loopback(host) == alone
    keys.check(host, Access([hashed(KEYS[0])]))
    keys.check(host, Access(insecure=True))
    if alone:
        keys.check(host, Access())
    else:
        with pytest.raises(UserError, match="--insecure"):
            keys.check(host, Access())


def test_any_of_the_keys_admits_and_nothing_else() -> None:
    hashes = [hashed(key).encode() for key in KEYS]
    for key in KEYS:
        assert keys.admits(hashes, f"Bearer {key}".encode())
    for other in (
        b"",
        b"Bearer ",
        b"Bearer x",
        hashes[0],
        b"Bearer " + hashes[0],
        KEYS[0].encode(),
    ):
        assert not keys.admits(hashes, other)
    assert not keys.admits([], b"Bearer ")


@pytest.mark.parametrize("flags", [[], ["--print-config"]])
def test_a_command_that_would_let_everybody_in_says_so(
    flags: list[str], trained: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as e:
        main(["serve", "--model", str(trained), *flags, "target.serve.host=0.0.0.0"])
    assert e.value.code == 2
    assert "there is no API key" in capsys.readouterr().err


def test_a_serve_config_file_has_hashes_and_no_key(
    trained: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORKLOADS_API_KEYS", KEYS[0])
    with pytest.raises(SystemExit) as e:
        main(["serve", "--model", str(trained), "--print-config", "target.serve.host=0.0.0.0"])
    text = capsys.readouterr().out
    assert (e.value.code, KEYS[0] in text, hashed(KEYS[0]) in text) == (0, False, True)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["tls_certfile=a.pem"], "serve.tls_certfile is given but serve.tls_keyfile is not"),
        (
            ["tls_certfile=a.pem", "tls_keyfile=b.pem", "ingress=haproxy"],
            "serve.ingress is 'haproxy', which has no TLS",
        ),
    ],
)
def test_half_a_certificate_or_one_for_haproxy_is_refused(
    overrides: list[str], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        load("docstrings", "laptop", [f"target.serve.{one}" for one in overrides])
