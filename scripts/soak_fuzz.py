"""Does a deployment bear hostile input? Sends it and counts what comes back.

    .venv/bin/python scripts/soak_fuzz.py --model runs/NAME --texts FILE
    .venv/bin/python scripts/soak_fuzz.py --url http://127.0.0.1:8000 --texts FILE

Two replicas of `workloads serve` on this machine, or what answers at --url (then no process is
watched). While requests made from its OpenAPI document, broken HTTP, hundreds of connections that
send by the byte and a long mixture of all kinds of requests come in, a well-behaved client asks for
texts whose answers are known. Claims: no answer is a 5xx, that client gets every answer, no process
ends, and the memory of replicas and HAProxy grows by 5 % at most over the mixture. Exit code 1 when
a claim does not hold. FILE has one text a line. Not covered: floods (scripts/soak_serve.py).
"""

import argparse
import asyncio
import contextlib
import gzip
import json
import os
import random
import re
import struct
import sys
import tempfile
import time
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import date
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import urlsplit

import aiohttp
import psutil
from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).parent))
import soak_serve

GROWTH = 0.05
SETTLED_S = 15
PATIENCE_S = 1.0  # for the first byte of an answer to what may be half a request
LATE_S = 10.0  # where there must be one, on a machine that does other work too
SILENCE_S = 0.25  # after which an answer is taken to be complete


# ---------------------------------------------------------------- requests


class Post(NamedTuple):
    """A request that is HTTP, with the statuses that are right for it."""

    name: str
    path: str
    body: bytes
    codes: set[int]
    headers: dict[str, str] = {"content-type": "application/json"}


def _tensor(size: Any = None, **changed: Any) -> bytes:
    tensor: dict[str, Any] = {"name": "text", "shape": [1], "datatype": "BYTES", "data": ["a"]}
    if size is not None:
        del tensor["data"]
        tensor["parameters"] = {"binary_data_size": size}
    return json.dumps({"inputs": [{**tensor, **changed}]}).encode()


def _binary(name: str, size: Any, binary: bytes, codes: set[int]) -> tuple[str, bytes, Any, Any]:
    body = _tensor(size)
    return name, body + binary, codes, {"inference-header-content-length": str(len(body))}


def posts(model: str) -> list[Post]:
    """Hostile bodies for a classifier of that id."""
    named = json.dumps(model).encode()
    compressed = gzip.compress(b'{"inputs": "' + b"a" * 10_000_000 + b'"}')
    json_type = {"content-type": "application/json"}
    predict: list[tuple[Any, ...]] = [
        ("a text", b'{"inputs": "a warm film"}', {200}),
        ("nothing", b"", {400}),
        ("not JSON", b"{", {400}),
        ("not UTF-8", b'{"inputs": "\xff\xfe"}', {400}),
        ("an overlong NUL", b'{"inputs": "\xc0\x80"}', {400}),
        ("UTF-16", '{"inputs": "a"}'.encode("utf-16"), {400}),
        ("a byte order mark", b'\xef\xbb\xbf{"inputs": "a"}', {400}),
        ("deep lists", b"[" * 100_000, {400}),
        ("deep lists that close", b"[" * 10_000 + b"]" * 10_000, {400}),
        ("deep objects", b'{"inputs":' * 50_000 + b"1" + b"}" * 50_000, {400}),
        ("deep options", b'{"inputs": "a", "options": ' + b'{"a":' * 5_000 + b"1", {400}),
        ("a comment", b'{"inputs": "a"} // or not', {400}),
        ("two documents", b'{"inputs": "a"}{"inputs": "b"}', {400}),
        ("single quotes", b"{'inputs': 'a'}", {400}),
        ("NaN for a text", b'{"inputs": NaN}', {400, 422}),
        ("Infinity for a number", b'{"inputs": "a", "parameters": {"top_k": Infinity}}', {422}),
        ("1e400", b'{"inputs": "a", "parameters": {"top_k": 1e400}}', {400, 422}),
        ("5,000 digits", b'{"inputs": "a", "parameters": {"top_k": %s}}' % (b"9" * 5_000), {400}),
        ("4,000 digits", b'{"inputs": "a", "parameters": {"top_k": %s}}' % (b"9" * 4_000), {200}),
        ("below zero", b'{"inputs": "a", "parameters": {"top_k": -1}}', {422}),
        ("a bool", b'{"inputs": "a", "parameters": {"top_k": true}}', {422}),
        ("a lone surrogate", b'{"inputs": "\\ud800"}', {400}),
        ("surrogates exchanged", b'{"inputs": "\\udc00\\ud800"}', {400}),
        ("NUL", b'{"inputs": "a\\u0000b"}', {200}),
        ("a bare NUL", b'{"inputs": "a\0b"}', {400}),
        ("right-to-left", '{"inputs": "\u202eשלום\u202c 🎬👩‍👩‍👧‍👦 \ufdfa"}'.encode(), {200}),
        ("accents upon accents", ('{"inputs": "a' + "\u0301" * 50_000 + '"}').encode(), {200}),
        ("control characters", b'{"inputs": "\\u0001\\u0007\\u001b[2J\\u007f"}', {200}),
        ("white space", b'{"inputs": " \\t\\n\\r\\u00a0\\u2003"}', {200}),
        ("an empty text", b'{"inputs": ""}', {200}),
        ("empty texts", b'{"inputs": ["", "", ""]}', {200}),
        ("no texts", b'{"inputs": []}', {422}),
        ("a list in a list", b'{"inputs": [["a"]]}', {422}),
        ("keys twice", b'{"inputs": "a", "inputs": ["a", "b"]}', {200}),
        ("unknown keys", b'{"inputs": "a", "__proto__": {}, "constructor": 1}', {422}),
        (
            "90,000 keys",
            b'{"inputs": "a"%s}' % b"".join(b',"%d":1' % i for i in range(90_000)),
            {422},
        ),
        ("200,000 numbers", b'{"inputs": [%s1]}' % (b"1," * 200_000), {422}),
        ("300,000 texts", b'{"inputs": [%s""]}' % (b'"",' * 300_000), {413}),
        (
            "options by the megabyte",
            b'{"inputs":"a","options":{"a":[%s1]}}' % (b"[]," * 200_000),
            {200},
        ),
        ("a megabyte", b'{"inputs": "%s"}' % (b"a" * 2_000_000), {413}),
        ("one long word", b'{"inputs": "%s"}' % (b"a" * 300_000), {200}),
        ("no content type", b'{"inputs": "a"}', {415}, {"content-type": ""}),
        ("a form", b"inputs=a", {415}, {"content-type": "application/x-www-form-urlencoded"}),
        (
            "a content type twice",
            b'{"inputs": "a"}',
            {415},
            {"content-type": "text/plain, application/json"},
        ),
        ("a bomb (gzip)", compressed, {415}, {**json_type, "content-encoding": "gzip"}),
        ("a bomb (GZip)", compressed, {415}, {**json_type, "content-encoding": "identity, GZip"}),
        (
            "a bomb (deflate)",
            zlib.compress(b"a" * 10_000_000),
            {415},
            {**json_type, "content-encoding": "deflate"},
        ),
        ("a bomb (br)", b"\x0b\x02\x80a\x03", {415}, {**json_type, "content-encoding": "br"}),
        ("gzip without saying so", compressed, {400}),
    ]
    embed: list[tuple[Any, ...]] = [
        ("a text to embed", b'{"inputs": "a warm film"}', {200}),
        ("a false to normalize", b'{"inputs": "a", "normalize": false}', {422}),
        ("yes for true", b'{"inputs": "a", "truncate": "yes"}', {422}),
    ]
    late = {200, 429}  # three at a time
    why: list[tuple[Any, ...]] = [
        ("a text to explain", b'{"inputs": "a warm film"}', late),
        ("texts to explain", b'{"inputs": ["a", "b"]}', {422}),
        ("an empty text to explain", b'{"inputs": ""}', late),
        ("one long word to explain", b'{"inputs": "%s"}' % (b"a" * 300_000), late),
        (
            "right-to-left to explain",
            '{"inputs": "\u202eשלום\u202c 🎬👩‍👩‍👧‍👦 \ufdfa"}'.encode(),
            late,
        ),
        ("a million steps", b'{"inputs": "a", "parameters": {"steps": 1000000}}', {422}),
        (
            "a label by the megabyte",
            b'{"inputs": "a", "parameters": {"label": "%s"}}' % (b"a" * 300_000),
            {422},
        ),
    ]
    ids: list[tuple[Any, ...]] = [
        ("token ids", b"[2, 3]", {200}),
        ("token ids that are huge", b"[%s]" % (b"9" * 4_000), {422}),
        ("token ids over 64 bits", b"[[18446744073709551616]]", {422}),
        ("token ids below zero", b"[-1]", {422}),
        ("token ids that are bools", b"[true, false]", {422}),
        ("token ids that are floats", b"[1.0]", {422}),
        ("token ids among texts", b'[1, "a"]', {422}),
        ("no token ids", b"[[]]", {422}),
        ("rows and ids", b"[[1], 1]", {422}),
        ("490,000 token ids", b"[%s1]" % (b"1," * 490_000), {413}),
        ("300,000 wrong token ids", b"[%s-1]" % (b"-1," * 300_000), {422}),
        ("200,000 objects", b"[%s{}]" % (b"{}," * 200_000), {422}),
        ("rows by the thousand", b"[%s[1]]" % (b"[1]," * 200_000), {413}),
    ]
    openai: list[tuple[Any, ...]] = [
        (name, b'{"model": %s, "input": %s}' % (named, given), codes) for name, given, codes in ids
    ]
    openai += [
        ("a model of another name", b'{"model": "../../etc/passwd", "input": "a"}', {404}),
        ("a dimension", b'{"model": %s, "input": "a", "dimensions": 0}' % named, {400}),
    ]
    infer: list[tuple[Any, ...]] = [
        ("a tensor", _tensor(), {200}),
        ("a huge shape", _tensor(shape=[2**62]), {422}),
        ("a shape over 64 bits", _tensor(shape=[10**4000]), {422}),
        (
            "a shape that overflows to one",
            _tensor(shape=[2**32 + 1, 2**32 * (2**32 - 1) + 1]),
            {422},
        ),
        ("a shape of nothing", _tensor(shape=[0], data=[]), {422}),
        ("a shape below zero", _tensor(shape=[-1]), {422}),
        ("a shape of bools", _tensor(shape=[True]), {422}),
        ("a shape without numbers", _tensor(shape=[]), {422}),
        ("a shape of many dimensions", _tensor(shape=[1] * 1000), {422}),
        ("columns", _tensor(shape=[1, 2], data=["a", "b"]), {422}),
        ("240,000 rows", _tensor(data=[["a"]] * 90_000), {422}),
        ("200,000 outputs", _tensor()[:-1] + b', "outputs": [%s{}]}' % (b"{}," * 200_000), {422}),
        (
            "the same output thrice",
            _tensor()[:-1] + b', "outputs": [%s]}' % b",".join([b'{"name": "label"}'] * 3),
            {200},
        ),
        _binary("bytes", 5, struct.pack("<I", 1) + b"a", {200}),
        _binary("bytes whose size is a bool", True, b"a", {422}),
        _binary("bytes whose size is a float", 5.5, struct.pack("<I", 1) + b"a", {422}),
        _binary("bytes whose size is a text", "5", struct.pack("<I", 1) + b"a", {422}),
        _binary("bytes whose size is below zero", -5, struct.pack("<I", 1) + b"a", {422}),
        _binary("bytes whose size is huge", 10**30, struct.pack("<I", 1) + b"a", {422}),
        _binary("bytes whose length is huge", 5, struct.pack("<I", 2**32 - 1) + b"a", {422}),
        _binary("bytes that end early", 3, b"\0\0\0", {422}),
        _binary("bytes that are not UTF-8", 6, struct.pack("<I", 2) + b"\xff\xfe", {422}),
        _binary("900,000 bytes of empty texts", 900_000, b"\0" * 900_000, {422}),
        (
            "a length beyond the body",
            _tensor(),
            {400},
            {"inference-header-content-length": "99999"},
        ),
        ("a length below zero", _tensor(), {400}, {"inference-header-content-length": "-1"}),
        ("a length of other digits", _tensor(), {400}, {"inference-header-content-length": "\xb2"}),
        (
            "a length of many digits",
            _tensor(),
            {400},
            {"inference-header-content-length": "9" * 5000},
        ),
        ("a length of nothing", _tensor(), {400}, {"inference-header-content-length": "0"}),
    ]
    by_path = {"/predict": predict, "/embed": embed, "/explain": why, "/v1/embeddings": openai}
    by_path[f"/v2/models/{model}/infer"] = infer
    return [Post(c[0], path, *c[1:]) for path, cases in by_path.items() for c in cases]


class Raw(NamedTuple):
    """Bytes that may be no HTTP, with the statuses that are right; None: no answer."""

    name: str
    data: bytes
    codes: set[int | None]


_BODY = b'{"inputs": "a"}'
_CHUNKS = b"f\r\n" + _BODY + b"\r\n0\r\n\r\n"
_CLOSE = b"connection: close"
_CHUNKED = b"transfer-encoding: chunked"
_KEY = b"sec-websocket-key: dGhlIHNhbXBsZSBub25jZQ=="


def _post(
    *headers: bytes,
    body: bytes = _BODY,
    length: bytes | None = b"",
    start: bytes = b"POST /predict HTTP/1.1",
) -> bytes:
    lines = [start, b"host: x", b"content-type: application/json"]
    if length is not None:
        lines.append(b"content-length: " + (length or str(len(body)).encode()))
    return b"\r\n".join([*lines, *headers, b"", body])


def _get(path: bytes, *headers: bytes, method: bytes = b"GET") -> bytes:
    return b"\r\n".join(
        [method + b" " + path + b" HTTP/1.1", b"host: x", *headers, _CLOSE, b"", b""]
    )


def raws() -> list[Raw]:
    """Handmade: HAProxy, Ray's own proxy and uvicorn differ in what they bear."""
    fine = {200, 400}
    cases: list[tuple[str, bytes, set[Any]]] = [
        ("HTTP", _post(_CLOSE), {200}),
        ("HTTP/0.9", b"GET /\r\n", {400, None}),
        ("HTTP/1.0", _post(start=b"POST /predict HTTP/1.0"), {200}),
        ("HTTP/3.0", _post(_CLOSE, start=b"POST /predict HTTP/3.0"), fine),
        ("HTTP/2 at once", b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\4\0\0\0\0\0", {400}),
        ("an upgrade to HTTP/2", _post(b"connection: upgrade", b"upgrade: h2c"), fine),
        (
            "a websocket",
            _get(
                b"/predict",
                b"connection: upgrade",
                b"upgrade: websocket",
                _KEY,
                b"sec-websocket-version: 13",
            ),
            {400, 403, 405},
        ),
        (
            "a websocket by POST",
            _post(
                b"connection: upgrade", b"upgrade: websocket", _KEY, b"sec-websocket-version: 13"
            ),
            fine,
        ),
        ("TLS", b"\x16\x03\x01\x02\0\x01\0\x01\xfc\x03\x03" + b"a" * 100, {400}),
        ("the PROXY protocol", b"PROXY TCP4 1.1.1.1 1.1.1.1 1 1\r\n" + _post(_CLOSE), {400}),
        ("all bytes", bytes(range(256)), {400}),
        ("NUL", b"\0" * 1000, {400}),
        ("lines", b"\r\n\r\n\r\n", {400, None}),
        ("nothing", b"", {None}),
        ("Expect: 100-continue", _post(_CLOSE, b"expect: 100-continue"), {100, 200}),
        ("Expect: miracles", _post(_CLOSE, b"expect: miracles"), {200, 417}),
        (
            "a body that is waited for",
            _post(b"expect: 100-continue", body=b"", length=b"15"),
            {100, None},
        ),
        ("a length twice", _post(_CLOSE, b"content-length: 15"), fine),
        ("two lengths", _post(_CLOSE, b"content-length: 3"), {400}),
        ("a length below zero", _post(_CLOSE, length=b"-1"), {400}),
        ("a length with a sign", _post(_CLOSE, length=b"+15"), {400}),
        ("a length list", _post(_CLOSE, length=b"15, 15"), fine),
        ("a length in hex", _post(_CLOSE, length=b"0xf"), {400}),
        ("a length over 64 bits", _post(_CLOSE, length=b"9" * 40), {400}),
        ("a length of an exabyte", _post(_CLOSE, length=b"9" * 18), {None}),
        ("a length that is short", _post(_CLOSE, length=b"5"), {400}),
        ("no length", _post(_CLOSE, length=None), {400}),
        ("chunks", _post(_CLOSE, _CHUNKED, body=_CHUNKS, length=None), {200}),
        ("chunks and a length", _post(_CLOSE, _CHUNKED, body=_CHUNKS), fine),
        (
            "a chunk's extension",
            _post(_CLOSE, _CHUNKED, body=b"f;a=b\r\n" + _CHUNKS[3:], length=None),
            fine,
        ),
        (
            "chunks and trailers",
            _post(_CLOSE, _CHUNKED, body=_CHUNKS[:-2] + b"x: y\r\n\r\n", length=None),
            fine,
        ),
        ("chunks twice", _post(_CLOSE, _CHUNKED, _CHUNKED, body=_CHUNKS, length=None), {400}),
        (
            "chunks, then gzip",
            _post(_CLOSE, _CHUNKED + b", gzip", body=_CHUNKS, length=None),
            {400},
        ),
        (
            "gzip, then chunks",
            _post(_CLOSE, b"transfer-encoding: gzip, chunked", body=_CHUNKS, length=None),
            {200, 400, 415, 422},
        ),
        (
            "a transfer coding",
            _post(_CLOSE, b"transfer-encoding: xchunked", body=_CHUNKS, length=None),
            {400},
        ),
        (
            "identity",
            _post(_CLOSE, b"transfer-encoding: identity", body=_CHUNKS, length=None),
            {400},
        ),
        (
            "a space before the colon",
            _post(_CLOSE, b"transfer-encoding : chunked", body=_CHUNKS, length=None),
            {400},
        ),
        (
            "a tab before chunked",
            _post(_CLOSE, b"transfer-encoding: \x0bchunked", body=_CHUNKS, length=None),
            {400},
        ),
        (
            "a chunk of no number",
            _post(_CLOSE, _CHUNKED, body=b"zz\r\n" + _CHUNKS[3:], length=None),
            {400},
        ),
        (
            "a chunk below zero",
            _post(_CLOSE, _CHUNKED, body=b"-1\r\n" + _CHUNKS[3:], length=None),
            {400},
        ),
        (
            "a chunk over 64 bits",
            _post(_CLOSE, _CHUNKED, body=b"f" * 20 + _CHUNKS[1:], length=None),
            {400},
        ),
        (
            "chunks ended by line feeds",
            _post(_CLOSE, _CHUNKED, body=_CHUNKS.replace(b"\r\n", b"\n"), length=None),
            {400},
        ),
        (
            "smuggled: length, chunks",
            _post(_CHUNKED, body=b"0\r\n\r\nGET /v2 HTTP/1.1\r\nhost: x\r\n\r\n"),
            {200, 400},
        ),
        (
            "smuggled: chunks, length",
            _post(_CHUNKED, body=b"1c\r\nGPOST /v2 HTTP/1.1\r\nhost: x\r\n0\r\n\r\n", length=b"4"),
            {400, None},
        ),
        ("a folded header", _post(_CLOSE, b"x: a\r\n b"), fine),
        ("a bare CR", _post(_CLOSE, b"x: a\rb: c"), {400}),
        ("NUL in a header", _post(_CLOSE, b"x: a\0b"), {400}),
        ("no colon", _post(_CLOSE, b"xxxx"), {400}),
        ("no name", _post(_CLOSE, b": x"), {400}),
        ("a long header", _post(_CLOSE, b"x: " + b"a" * 60_000), {400, 431}),
        ("a longer header", _post(_CLOSE, b"x: " + b"a" * 1_000_000), {400, 431}),
        ("2,000 headers", _post(_CLOSE, *(b"x%d: y" % i for i in range(2000))), {200, 400, 431}),
        ("a long path", _get(b"/" + b"a" * 30_000), {404}),
        ("a longer path", _get(b"/" + b"a" * 200_000), {400, 404, 414}),
        ("no host", b"GET /healthz HTTP/1.1\r\nconnection: close\r\n\r\n", fine),
        ("two hosts", _get(b"/healthz", b"host: y"), fine),
        ("a host that is none", _get(b"/nix").replace(b"host: x", b"host: [:"), {400, 404}),
        ("a host of bytes", _get(b"/nix").replace(b"host: x", b"host: a b\xff/?#@"), {400, 404}),
        ("a slash more", _get(b"/healthz/"), {404}),
        ("two slashes", _get(b"//evil.example/"), {404}),
        ("another server", _get(b"http://other/healthz"), fine),
        ("another server that is none", _get(b"http://[:/healthz"), {400}),
        ("CONNECT", _get(b"x:443", method=b"CONNECT"), {400, 405}),
        ("OPTIONS *", _get(b"*", method=b"OPTIONS"), {400, 404, 405}),
        ("TRACE", _get(b"/predict", method=b"TRACE"), {405}),
        ("a method of its own", _get(b"/predict", method=b"FROB"), {400, 405}),
        ("a method in small letters", _get(b"/healthz", method=b"get"), {400, 405}),
        ("a long method", _get(b"/healthz", method=b"A" * 10_000), {400, 405}),
        ("no path", _get(b""), {400}),
        ("a path without a slash", _get(b"abc"), {400}),
        ("a query only", _get(b"?a"), {400}),
        ("a fragment", _get(b"/healthz#a"), fine),
        ("escapes that are none", _get(b"/v2/models/%zz%GG%2"), {404}),
        ("escapes that are not UTF-8", _get(b"/v2/models/%ff%fe"), {404}),
        ("an escaped surrogate", _get(b"/v2/models/%ed%a0%80"), {404}),
        ("an escaped NUL", _get(b"/v2/models/%00"), {404}),
        ("an escaped line", _get(b"/v2/models/a%0d%0aset-cookie:%20a"), {404}),
        ("a path that is not ASCII", _get("/v2/models/é日".encode()), {400}),
        ("up", _get(b"/../../etc/passwd"), {400, 404}),
        ("up, escaped", _get(b"/docs/..%2f..%2f..%2fetc%2fpasswd"), {400, 404}),
        ("up, escaped twice", _get(b"/%252e%252e/%252e%252e/etc/passwd"), {404}),
        ("a body with GET", _get(b"/healthz", b"content-length: 5") + b"hello", fine),
        ("line feeds only", b"GET /healthz HTTP/1.1\nhost: x\nconnection: close\n\n", fine),
        ("twenty at once", _post() * 20 + _post(_CLOSE), {200}),
        (
            "one more after too long a body",
            _post(body=b"a" * 1_200_000) + _post(_CLOSE),
            {200, 413, 415},
        ),
    ]
    for name in (
        "x-request-id",
        "x-session-id",
        "x-request-timeout-seconds",
        "traceparent",
        "x-request-disconnect-disabled",
        "serve_multiplexed_model_id",
        "authorization",
        "serve-multiplexed_model-id",
        "x_session_id",
        "cookie",
        "user-agent",
        "content-type",
    ):
        cases.append(
            (f"{name} of bytes", _post(_CLOSE, name.encode() + b": \xff\xfe"), {200, 400, 415})
        )
    for value in (b"nan", b"inf", b"-1", b"0", b"1e400", b"x"):
        header = b"x-request-timeout-seconds: " + value
        cases.append((header.decode(), _post(_CLOSE, header), {200}))
    return [Raw(*case) for case in cases]


_TOKENS = [
    b"\0",
    b"\r\n",
    b"\r\n\r\n",
    b"\n",
    b"\r",
    b" ",
    b"\t",
    b":",
    b"%ff",
    b"%",
    b"\xff",
    b"/",
    b"?",
    b"#",
    b"*",
    b"[",
    b'{"',
    b"0",
    b"-1",
    b"9" * 20,
    b"content-length: 5\r\n",
    b"\xed\xa0\x80",
    b"transfer-encoding: chunked\r\n",
    b"connection: upgrade\r\nupgrade: websocket\r\n",
    b"expect: 100-continue\r\n",
    b"content-encoding: gzip\r\n",
    b"host: y\r\n",
    b"GET / HTTP/1.1\r\n",
    b"HTTP/2.0",
    b"x-request-id: \xff\r\n",
    b"x" * 5000,
]


def mutated(rng: random.Random, seeds: list[bytes]) -> bytes:
    """One of them with a few pieces changed."""
    data = rng.choice(seeds)
    for _ in range(rng.randint(1, 4)):
        # Most of what is parsed stands at the beginning.
        at = rng.randrange(min(len(data), 400) + 1)
        to = min(len(data), at + rng.randint(1, 12))
        data = rng.choice(
            [
                data[:at] + data[to:],
                data[:to] + data[at:],
                data[:at] + rng.choice(_TOKENS) + data[at:],
                data[:at] + rng.choice(_TOKENS) + data[to:],
                data[:at] + rng.randbytes(to - at) + data[to:],
                data[:at] + rng.choice(seeds)[at:],
            ]
        )
    return data


def storm(seed: int, count: int) -> list[bytes]:
    """So many mutated requests; the same for the same seed."""
    rng = random.Random(seed)
    seeds = [raw.data for raw in raws() if 0 < len(raw.data) < 20_000]
    return [mutated(rng, seeds) for _ in range(count)]


# ---------------------------------------------------------------- sending


async def exchange(
    host: str, port: int, data: bytes, patience_s: float = PATIENCE_S
) -> list[int | None]:
    """The statuses that come back for some bytes on a connection of their own."""
    said = b""
    try:
        reader, writer = await asyncio.open_connection(host, port)
    except OSError:
        return [None]
    try:
        writer.write(data)
        while piece := await asyncio.wait_for(
            reader.read(65_536), SILENCE_S if said else patience_s
        ):
            said += piece
    except (TimeoutError, OSError):
        pass  # it waits for more, or has closed while we were still sending
    finally:
        writer.transport.abort()
    return [int(code) for code in re.findall(rb"HTTP/1\.[01] (\d{3}) ", said)] or [None]


async def exchanges(
    host: str, port: int, many: list[bytes], at_once: int = 16, patience_s: float = PATIENCE_S
) -> list[list[int | None]]:
    """The same for many, in their order."""
    free = asyncio.Semaphore(at_once)

    async def one(data: bytes) -> list[int | None]:
        async with free:
            return await exchange(host, port, data, patience_s)

    return await asyncio.gather(*map(one, many))


async def answers(host: str, port: int, many: list[Raw]) -> list[list[int | None]]:
    """What comes back for each; what must be answered, and is not soon, is asked once more."""
    found = await exchanges(host, port, [raw.data for raw in many])
    late = [i for i, raw in enumerate(many) if found[i] == [None] and None not in raw.codes]
    again = await exchanges(host, port, [many[i].data for i in late], patience_s=LATE_S)
    for i, codes in zip(late, again, strict=True):
        found[i] = codes
    return found


async def slowly(host: str, port: int, connections: int, seconds: float) -> Counter[str]:
    """Connections that send a head or a body by the byte, two a second, until they are told to be
    quicker or the time is over; statuses of the answers."""
    seen: Counter[str] = Counter()
    end = time.monotonic() + seconds

    async def one(number: int) -> None:
        whole = _post(b"x: " + b"a" * 2000)
        said = whole.index(_BODY) if number % 2 else 20
        reader, writer = await asyncio.open_connection(host, port)
        writer.write(whole[:said])
        answer = asyncio.ensure_future(reader.read(100))
        with contextlib.suppress(OSError):
            while time.monotonic() < end and not answer.done() and said < len(whole):
                writer.write(whole[said : said + 1])
                said += 1
                await asyncio.wait([answer], timeout=0.5)
            await asyncio.wait([answer], timeout=5)
        head = answer.result() if answer.done() and not answer.exception() else b""
        code = re.match(rb"HTTP/1\.[01] (\d{3}) ", head)
        seen[code[1].decode() if code else "none"] += 1
        answer.cancel()
        writer.transport.abort()

    await asyncio.gather(*map(one, range(connections)))
    return seen


def load_schema(url: str, seed: int, examples: int, app: Any = None, key: str | None = None) -> Any:
    """The schema of a deployment, with all of schemathesis' checks but those that cannot hold."""
    import schemathesis
    from schemathesis.config import SchemathesisConfig

    config = SchemathesisConfig.from_dict(
        {
            "seed": seed,
            "auth": {"openapi": {"key": {"bearer": key}}} if key else {},
            "generation": {"max-examples": examples, "deterministic": True},
            "checks": {
                # Who has no key is told so first, whatever the method.
                "unsupported_method": {"enabled": key is None},
                # Too many and too long inputs are refused with 413. How many tokens a text has, no
                # schema says.
                "negative_data_rejection": {
                    "expected-statuses": ["400", "401", "404", "405", "413", "415", "422", "429"]
                },
                "positive_data_acceptance": {
                    "expected-statuses": ["2xx", "401", "404", "413", "429"]
                },
            },
            "operations": [
                {
                    # A shape that fits its data is nothing that a schema can ask for.
                    "include-path-regex": "/infer$",
                    "checks": {"positive_data_acceptance": {"enabled": False}},
                }
            ],
        }
    )
    how: dict[str, Any] = {"config": config}
    if key:
        how["headers"] = {"authorization": f"Bearer {key}"}
    if app is not None:
        return schemathesis.openapi.from_asgi("/openapi.json", app, **how)
    return schemathesis.openapi.from_url(f"{url}/openapi.json", **how)


def has_float(body: Any) -> bool:
    """Whether there is one anywhere in it."""
    if isinstance(body, dict | list):
        return any(map(has_float, body.values() if isinstance(body, dict) else body))
    return isinstance(body, float)


def generated(schema: Any, statuses: Counter[str]) -> list[str]:
    """What is wrong with the answers to requests made from a schema."""
    from schemathesis.engine import events, from_schema

    wrong: dict[str, str] = {}
    for event in from_schema(schema).execute():
        if isinstance(event, events.FatalError):
            raise event.exception
        if isinstance(event, events.NonFatalError):
            wrong[f"{event.label}: {event.value}"[:300]] = ""
        recorder = getattr(event, "recorder", None)
        if recorder is None:
            continue
        for interaction in recorder.interactions.values():
            response = interaction.response
            statuses[str(response.status_code) if response else "none"] += 1
        for number, checks in recorder.checks.items():
            body = recorder.cases[number].value.body
            for check in checks:
                if check.failure_info is None:
                    continue
                # JSON Schema takes 1.0 for an integer, and cannot be told otherwise.
                if check.name == "positive_data_acceptance" and has_float(body):
                    continue
                failure = check.failure_info.failure
                said = f"{failure.message[:300]}; {str(body)[:200]}"
                wrong.setdefault(f"{recorder.label}: {check.name}: {failure.title}", said)
    return [f"{what}: {said}" for what, said in wrong.items()]


# ---------------------------------------------------------------- the parts


@dataclass
class Part:
    """A line of the table."""

    name: str
    statuses: Counter[str] = field(default_factory=Counter)
    control: soak_serve.Load = field(default_factory=soak_serve.Load)
    ended: int = 0  # processes
    before: int = 0  # bytes of replicas and HAProxy
    after: int = 0
    problems: list[str] = field(default_factory=list)

    @property
    def growth(self) -> float:
        """Of memory."""
        return self.after / self.before - 1 if self.before else 0.0

    def of(self, first: str) -> int:
        """Answers of a class, 429 not among the 4xx."""
        return sum(n for code, n in self.statuses.items() if code[0] == first and code != "429")


@dataclass
class Target:
    """What is fuzzed, and what it is known to answer."""

    url: str
    texts: list[str]
    known: dict[str, dict[str, float]]
    server: soak_serve.Server | None = None
    model: str = ""

    @property
    def at(self) -> tuple[str, int]:
        """Host and port."""
        parts = urlsplit(self.url)
        return parts.hostname or "127.0.0.1", parts.port or 80

    def pids(self) -> set[int]:
        """Replicas and HAProxy; none where it is another's deployment."""
        if self.server is None:
            return set()
        return set(self.server.pids("ray::ServeReplica")) | set(self.server.pids("/haproxy -db"))

    def memory(self) -> int:
        """Bytes that these alone have (USS)."""
        return sum(psutil.Process(pid).memory_full_info().uss for pid in self.pids())

    def settle(self) -> None:
        """Returns when processes have not changed for a while: each replica that comes has HAProxy
        replaced."""
        last, since = self.pids(), time.monotonic()
        while time.monotonic() - since < SETTLED_S:
            time.sleep(1)
            if (now := self.pids()) != last:
                last, since = now, time.monotonic()


@contextlib.contextmanager
def watched(target: Target, part: Part) -> Iterator[Part]:
    """A well-behaved client and the processes, while something happens."""
    pids, part.before = target.pids(), target.memory()
    callers = soak_serve.Callers(
        target.url, [[t] for t in target.texts], {"it": target.known}, connections=2, pause_s=0.1
    )
    with soak_serve.load(callers) as part.control:
        yield part
    part.after, part.ended = target.memory(), len(pids - target.pids())
    control = part.control
    if control.failed or control.wrong or control.refused or not control.answered:
        part.problems.append(f"control {dict(control.statuses)}, {control.wrong} wrong")
    if part.ended:
        part.problems.append(f"{part.ended} processes ended")
    if part.of("5"):
        part.problems.append(f"5xx: {dict(part.statuses)}")


def _count(statuses: list[list[int | None]]) -> Counter[str]:
    return Counter(str(code or "none") for answers in statuses for code in answers)


def from_schema(target: Target, cases: int) -> Part:
    """What its OpenAPI document makes one think of."""
    part = Part("made from /openapi.json (schemathesis)")
    wrong: list[str] = []
    with watched(target, part):
        for seed in range(1, 1 + cases):
            examples = max(10, min(400, cases // 20))
            wrong += generated(load_schema(target.url, seed, examples), part.statuses)
            tell(f"  {part.statuses.total():,} cases, {len(set(wrong))} wrong")
            if part.statuses.total() >= cases:
                break
    part.problems += sorted(set(wrong))
    return part


def broken(target: Target, cases: int) -> Part:
    """What is no proper HTTP, by hand and by chance."""
    part = Part("broken and hostile HTTP (raw sockets)")
    handmade = raws()
    with watched(target, part):
        found = asyncio.run(answers(*target.at, handmade))
        for raw, codes in zip(handmade, found, strict=True):
            if set(codes) - raw.codes:
                part.problems.append(f"{raw.name}: {codes}, not {raw.codes}")
        found += asyncio.run(exchanges(*target.at, storm(1, max(0, cases - len(handmade)))))
    part.statuses += _count(found)
    part.problems += [f"5xx: {part.statuses}"] * any(c and c >= 500 for a in found for c in a)
    return part


def slow(target: Target, connections: int, seconds: float) -> Part:
    """Slowloris."""
    part = Part(f"{connections} connections, two bytes a second")
    with watched(target, part):
        part.statuses += asyncio.run(slowly(*target.at, connections, seconds))
    return part


async def mixture(
    target: Target, count: int, statuses: Counter[str], seed: int, memory: list[int]
) -> list[str]:
    """Ordinary requests, and a hostile one among four; what is wrong. `memory` gets 100 samples."""
    rng, wrong, number = random.Random(seed), set(), 0
    hostile = [post for post in posts(target.model) if len(post.body) < 20_000]
    large = [post for post in posts(target.model) if len(post.body) >= 20_000]
    raw = storm(seed, 500)

    async def one(session: aiohttp.ClientSession) -> None:
        draw = rng.random()
        if draw < 0.01:
            answers = await exchange(*target.at, rng.choice(raw))
            statuses.update(str(code or "none") for code in answers)
            return
        if draw < 0.25:
            post = rng.choice(large if draw < 0.015 else hostile)
        else:
            few = rng.sample(target.texts, rng.randint(1, 3))
            path, codes = rng.choice(["/predict", "/predict", "/embed"]), {200}
            post = Post("ordinary", path, json.dumps({"inputs": few}).encode(), codes)
        for patience in (1, 1, 1, 0):
            async with session.post(
                target.url + post.path, data=post.body, headers=post.headers
            ) as response:
                await response.read()
                statuses[str(response.status)] += 1
            if response.status != 429 or not patience:
                break
            await asyncio.sleep(patience)
        if response.status not in post.codes:
            wrong.add(f"{post.name}: {response.status}, not {post.codes}")

    async def caller(session: aiohttp.ClientSession) -> None:
        nonlocal number
        while number < count:
            number += 1
            if number % max(1, count // 100) == 0:
                memory.append(target.memory())
                if len(memory) % 5 == 0:
                    tell(f"  {number:,} requests, {memory[-1] / 1e6:,.0f} MB")
            try:
                await one(session)
            except (aiohttp.ClientError, TimeoutError, OSError) as e:
                statuses["none"] += 1
                wrong.add(f"{type(e).__name__}: {e}")

    async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=60)) as session:
        await asyncio.gather(*(caller(session) for _ in range(6)))
    return sorted(wrong)


def mixed(target: Target, count: int) -> Part:
    """Does memory grow? Not counted: what is made at first, for ever, and what megabytes of JSON
    take for a moment: the least of the first fifth is compared with the least of the last."""
    asyncio.run(mixture(target, max(1, count // 5), Counter(), 1, []))
    part = Part("ordinary and hostile requests")
    memory: list[int] = []
    with watched(target, part):
        part.problems += asyncio.run(mixture(target, count, part.statuses, 2, memory))
    fifth = len(memory) // 5 or 1
    part.before, part.after = min(memory[:fifth]), min(memory[-fifth:])
    if part.growth > GROWTH:
        part.problems.append(f"memory grows by {part.growth:.1%}")
    return part


# ---------------------------------------------------------------- the table


def tell(line: str) -> None:
    """Progress."""
    print(line, file=sys.stderr, flush=True)


def table(parts: list[Part]) -> Table:
    """A line each."""
    title = f"{soak_serve.cpu()}, {os.cpu_count()} cores, {date.today()}"
    shown = Table(title=title, title_justify="left")
    for heading in (
        *("part", "cases", "2xx", "4xx", "429", "5xx", "no answer", "ended"),
        *("control: answered", "failed", "memory MB", "holds"),
    ):
        shown.add_column(heading, overflow="fold")
    for part in parts:
        control, codes = part.control, part.statuses
        shown.add_row(
            part.name,
            f"{codes.total():,}",
            *(f"{part.of(first):,}" for first in "24"),
            f"{codes['429']:,}",
            f"{part.of('5'):,}",
            f"{codes['none']:,}",
            str(part.ended),
            f"{len(control.answered):,}",
            str(control.failed + control.wrong + control.refused),
            f"{part.before / 1e6:,.0f} to {part.after / 1e6:,.0f} ({part.growth:+.1%})",
            "; ".join(part.problems)[:2000] or "yes",
        )
    return shown


@contextlib.contextmanager
def reached(args: argparse.Namespace, texts: list[str]) -> Iterator[Target]:
    """The deployment at --url, or one of --model that is gone afterwards."""
    if args.url:
        yield Target(args.url, texts, soak_serve.answers_in_quiet(args.url, texts))
        return
    model = args.model / "model" if (args.model / "model").is_dir() else args.model
    with (
        tempfile.TemporaryDirectory() as scratch,
        soak_serve.deployed(model.resolve(), Path(scratch), texts, flags=args.flags) as soak,
    ):
        target = Target(soak.server.url, texts, soak.known["old"], soak.server)
        target.settle()
        yield target


def identity(url: str) -> str:
    """The model's name in paths."""

    async def ask() -> str:
        async with aiohttp.ClientSession() as session, session.get(f"{url}/v1/models") as response:
            return (await response.json())["data"][0]["id"]

    return asyncio.run(ask())


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    where = parser.add_mutually_exclusive_group(required=True)
    where.add_argument("--model", type=Path, help="a run or its model folder, of a classifier")
    where.add_argument("--url", help="of a deployment that runs")
    parser.add_argument("--texts", required=True, type=Path, help="one text a line")
    # 0 leaves a part out.
    parser.add_argument("--cases", type=int, default=20_000, help="made from the document")
    parser.add_argument("--raw", type=int, default=5_000, help="connections with broken HTTP")
    parser.add_argument("--slow", type=int, default=400, help="connections that send by the byte")
    parser.add_argument("--requests", type=int, default=100_000, help="of the mixture")
    parser.add_argument("flags", nargs="*", metavar="KEY=VALUE", help="for `workloads serve`")
    args = parser.parse_args()
    texts = [line for line in args.texts.read_text().splitlines() if line.strip()][:50]
    parts: list[Part] = []
    with reached(args, texts) as target:
        target.model = identity(target.url)
        todo: list[Callable[[], Part]] = [
            *[lambda: from_schema(target, args.cases)] * bool(args.cases),
            *[lambda: broken(target, args.raw)] * bool(args.raw),
            *[lambda: slow(target, args.slow, seconds=40)] * bool(args.slow),
            *[lambda: mixed(target, args.requests)] * bool(args.requests),
        ]
        for do in todo:
            began = time.monotonic()
            parts.append(do())
            part = parts[-1]
            tell(f"{part.name}: {time.monotonic() - began:.0f} s, {dict(part.statuses)}")
            tell(f"  {part.problems}")
    Console(width=240 if not sys.stdout.isatty() else None).print(table(parts))
    sys.exit(any(part.problems for part in parts))


if __name__ == "__main__":
    main()
