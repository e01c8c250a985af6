"""GET /openapi.json: what a client may use, as OpenAPI 3.1 has it (https://spec.openapis.org/oas/v3.1.0).

All of it is made from schema.sql. The body of a message is described as far as generated columns that are one member
(body ->> 'name'), their types, NOT NULL and simple CHECKs tell it. It is what a sender should send: a TEXT column alone
also takes a number. Other rules are not in it, so a message that fits can still be refused with 409 or 422.
"""

import re
from collections.abc import Iterator
from typing import Any

import falcon

import service
from service import CSV, JSON, MAX_ID, NDJSON, Client, Store, Stream, fold

Json = dict[str, Any]

TYPES = {"TEXT": "string", "REAL": "number", "INTEGER": "integer", "INT": "integer"}
JSON_TYPES = {"text": "string", "integer": "integer", "real": "number", "object": "object", "array": "array"}
# Of a CREATE TABLE, as the tokens of service.normal() with spaces between.
NAME = r"""([\w$]+|"[^"]+"|`[^`]+`|\[[^\]]+\])"""
NUMBER = r"((?:- )?\d+(?: \. \d+)?)"
TEXTS = r"\( ((?:'(?:[^']|'')*' , )*'(?:[^']|'')*') \)"
A_MEMBER = re.compile(  # a column that is one member of the body
    rf"(?<=[(,] ){NAME} (\w+) (not null )?(?:generated always )?as"
    rf" \( body - > > '(?:\$\.(?=\w+'))?([^'$]+)' \)( not null)?"
)
FOR_A_VALUE = re.compile(rf"{NAME} is null or \( (.*) \)")
BETWEEN, LIMIT, ONE_OF, LENGTH, TYPE = (  # each alone, or between ANDs: no part of a longer expression
    re.compile(rf"(?:^|(?<= and )){rule}(?=$| and )")
    for rule in (
        rf"{NAME} between {NUMBER} and {NUMBER}",
        rf"{NAME} ([<>](?: =)?) {NUMBER}",
        rf"{NAME} in {TEXTS}",
        rf"length \( {NAME} \) (?:< =|between \d+ and) (\d+)",
        rf"json_type \( body , '\$\.(\w+)' \) (?:= ('\w+')|in {TEXTS})",
    )
)
LIMITS = {"> =": "minimum", "< =": "maximum", ">": "exclusiveMinimum", "<": "exclusiveMaximum"}
PROBLEMS = {400: "Malformed", 401: "No valid token", 403: "The client lacks the grant", 404: "There is nothing here"}
PROBLEMS |= {406: "Accept names nothing that is here", 503: "It failed: try again, with the same key"}
OF_POST = {409: "A UNIQUE index refuses it", 411: "No length", 413: "Too large", 415: "Its type is not taken"}
OF_POST |= {422: "A rule refuses it, or its key was used with another body"}
TEXT: Json = {"type": "string"}
OBJECT: Json = {"type": "object"}


def integer(low: int, high: int) -> Json:
    return {"type": "integer", "minimum": low, "maximum": high}


def shape(**members: Json) -> Json:
    """Return the schema of an object that has all of these members."""
    return {"type": "object", "required": [*members], "properties": members}


def parameter(name: str, schema: Json, where: str = "query") -> Json:
    return {"name": name, "in": where, "schema": schema, "required": where == "path"}


ID = integer(1, MAX_ID)
OR_NULL = ID | {"type": ["integer", "null"]}
THE_ID = parameter("id", ID, "path")
FIELDS = parameter("fields", integer(0, 1))
PAGE = [parameter("limit", integer(1, service.LARGEST_PAGE)), FIELDS]
PAGE += [parameter("wait", integer(0, service.LONGEST_WAIT_S))]
OTHER_KINDS = {NDJSON: TEXT}
if service.extra("reading"):
    PAGE += [parameter("since", TEXT | {"format": "date-time"})]
    OTHER_KINDS |= {CSV: TEXT}


class OpenApiResource:
    """/openapi.json"""

    def __init__(self, store: Store):
        self._streams = store.schema.streams
        self._bodies = {name: body_of(store, stream) for name, stream in self._streams.items() if stream.takes}

    def on_get(self, req: falcon.Request, resp: falcon.Response) -> None:
        client: Client = req.context.client
        paths: Json = {"/": {"get": operation("list", "What this client may use", {JSON: OBJECT})}}
        paths["/healthz"] = {"get": operation("health", "Can a message be written?", {JSON: OBJECT}) | {"security": []}}
        paths["/livez"] = {"get": operation("live", "Does this process answer?", {JSON: OBJECT}) | {"security": []}}
        if service.extra("metrics") and "read" in client.grants:
            paths["/metrics"] = {"get": operation("metrics", "For Prometheus", {"text/plain": TEXT})}
        for name, stream in self._streams.items():
            if client.can("read", stream):
                paths |= reads(stream) if stream.has_ids else report(stream)
            if stream.takes and client.can("write", stream):
                paths.setdefault(f"/{name}", {})["post"] = write(stream, self._bodies[name])
        bodies = {name: body for name, body in self._bodies.items() if f"/{name}" in paths}
        problem = shape(title=TEXT, status={"type": "integer"}, detail=TEXT)
        problem["properties"] |= {"line": ID, "stream": TEXT, "limit": ID}
        schemes = {scheme: {"type": "http", "scheme": scheme} for scheme in ("bearer", "basic")}
        resp.media = {
            "openapi": "3.1.0",
            "info": {"title": "Inlet", "version": service.__version__},
            "servers": [{"url": service.link(req, "").removesuffix("/") or "/"}],
            "security": [{scheme: []} for scheme in schemes],
            "paths": paths,
            "components": {"schemas": bodies | {"the.problem": problem}, "securitySchemes": schemes},
        }

    on_head = on_get


def operation(name: str, about: str, answers: Json, parameters: list[Json] | None = None, status: int = 200) -> Json:
    """Return an operation that answers with schemas, by their media types, or with a problem."""
    content = {kind: {"schema": schema} for kind, schema in answers.items()}
    responses = {str(status): {"description": about, "content": content}} | problems(PROBLEMS)
    return {"operationId": name, "summary": about, "parameters": parameters or [], "responses": responses}


def problems(found: dict[int, str]) -> Json:
    content = {"application/problem+json": {"schema": {"$ref": "#/components/schemas/the.problem"}}}
    return {str(status): {"description": about, "content": content} for status, about in found.items()}


def body(stream: Stream) -> Json:
    return {"$ref": f"#/components/schemas/{stream.name}"} if stream.takes else {}


def reads(stream: Stream) -> Json:
    """Return the paths of a feed."""
    name, key = stream.name, {"type": ["string", "null"]}
    envelope = shape(id=ID, received_at=TEXT, client=TEXT, key=key, body=body(stream))
    envelope["properties"] |= {"headers": {}, "fields": {"properties": {field: {} for field in stream.fields}}}
    page = shape(messages={"type": "array", "items": envelope}, next=TEXT)
    parameters = [parameter("after", integer(0, MAX_ID)), *PAGE, *(parameter(name, TEXT) for name in stream.fields)]
    kinds = {JSON: page} | OTHER_KINDS
    feed = operation(f"read.{name}", "Messages in commit order", kinds, parameters)
    one = operation(f"read_one.{name}", "One message", {JSON: envelope, NDJSON: TEXT}, [THE_ID, FIELDS])
    alone = operation(f"read_body.{name}", "Its body, as it was sent", {JSON: body(stream)}, [THE_ID])
    return {f"/{name}": {"get": feed}, f"/{name}/{{id}}": {"get": one}, f"/{name}/{{id}}/body": {"get": alone}}


def report(stream: Stream) -> Json:
    """Return the path of a report."""
    rows = {"type": "array", "items": {"type": "object", "properties": {name: {} for name in stream.fields}}}
    parameters = [PAGE[0], *(parameter(name, TEXT) for name in stream.fields)]
    parameters += [] if stream.id_place is None else [parameter("after", integer(-MAX_ID - 1, MAX_ID))]
    page = shape(rows=rows)
    page["properties"] |= {"more": {"type": "boolean"}} | ({} if stream.id_place is None else {"next": TEXT})
    kinds = {JSON: page} | OTHER_KINDS
    found = operation(f"read.{stream.name}", "The rows of a report", kinds, parameters)
    return {f"/{stream.name}": {"get": found}}


def write(stream: Stream, schema: Json) -> Json:
    """Return the POST of a stream. A form is named if its texts can be what the schema wants."""
    one = shape(id=ID, received_at=TEXT)
    many = shape(count=integer(0, MAX_ID), received_at=TEXT)
    many["properties"] |= {"first_id": OR_NULL, "last_id": OR_NULL, "refused": {"type": "array", "items": OBJECT}}
    parameters = [parameter("Idempotency-Key", TEXT | {"pattern": f"^{service.KEY}$"}, "header")]
    if service.extra("outcomes"):
        parameters.append(parameter("Prefer", TEXT | {"examples": ["handling=lenient"]}, "header"))
    taken = {JSON: {"anyOf": [one, many]}}
    found = operation(f"send.{stream.name}", "Take a message, or a batch", taken, parameters, 201)
    found["responses"] |= problems(OF_POST)
    if stream.has_answer:
        found["responses"]["200"] = {"description": "Stored, and answered by the column `answer`"}
    kinds = {JSON: body(stream), NDJSON: TEXT}
    texts = {name: member | TEXT for name, member in schema["properties"].items() if "string" in member["type"]}
    if service.extra("senders") and texts.keys() >= {*schema["required"]}:
        kinds[service.FORM] = schema | OBJECT | {"properties": texts}
    content = {kind: {"schema": schema} for kind, schema in kinds.items()}
    return found | {"requestBody": {"required": True, "content": content}}


def body_of(store: Store, stream: Stream) -> Json:
    """Return the JSON Schema of a body, as far as the CREATE TABLE tells it."""
    tokens, members, required = store.schema.objects["table", fold(stream.name)].words, {}, []
    checks = [] if "nocase" in tokens else list(checks_of(tokens))
    rules: dict[str, list[tuple[str, Json]]] = {}
    for check in checks:
        of_value = FOR_A_VALUE.fullmatch(check)
        for about, part in parts_of(of_value[2] if of_value else check):
            rules.setdefault(about, []).append((plain(of_value[1]) if of_value else "", part))
    for column, kind, is_required, member, is_required_too in A_MEMBER.findall(" ".join(tokens)):
        if kind.upper() not in TYPES:
            continue
        name, type_ = plain(column), TYPES[kind.upper()]
        schema: Json = integer(-MAX_ID - 1, MAX_ID) if type_ == "integer" else {"type": type_}
        for only_for, part in rules.get(name, []) + rules.get(f"'{member}'", []):
            schema |= part if only_for in ("", name) else {}
        if is_required or is_required_too:
            required.append(member)
        else:
            schema["type"] = [schema["type"], "null"]
            schema |= {"enum": [*schema["enum"], None]} if "enum" in schema else {}
        members[member] = schema
    is_object = required or "json_type ( body ) = 'object'" in checks
    return {"properties": members, "required": required} | (OBJECT if is_object else {})


def plain(name: str) -> str:
    """Return the name of a column without quotes, as SQLite compares it."""
    return fold(name[1:-1] if name[0] in '"`[' else name)


def checks_of(tokens: list[str]) -> Iterator[str]:
    """Yield what stands in each CHECK, with a space between its tokens."""
    for start, token in enumerate(tokens):
        if token == "check":
            depth, end = 1, start + 2
            while depth:
                depth += {"(": 1, ")": -1}.get(tokens[end], 0)
                end += 1
            yield " ".join(tokens[start + 2 : end - 1])


def parts_of(check: str) -> Iterator[tuple[str, Json]]:
    """Yield a column, or a 'member', and what a CHECK says of it. One with OR or NOT says nothing here."""
    if re.search(r"\b(?:or|not|case|iif|exists)\b", re.sub("'[^']*'", "''", check)):
        return
    for name, low, high in BETWEEN.findall(check):
        yield plain(name), {"minimum": number(low), "maximum": number(high)}
    for name, sign, limit in LIMIT.findall(check):
        yield plain(name), {LIMITS[sign]: number(limit)}
    for name, texts in ONE_OF.findall(check):
        yield plain(name), {"enum": [text.replace("''", "'") for text in re.findall(r"'((?:[^']|'')*)'", texts)]}
    for name, longest in LENGTH.findall(check):
        yield plain(name), {"maxLength": int(longest)}
    for member, one, several in TYPE.findall(check):
        types = {JSON_TYPES[kind] for kind in re.findall(r"\w+", one or several) if kind in JSON_TYPES}
        if len(types) == 1:
            yield f"'{member}'", {"type": types.pop()}


def number(text: str) -> int | float:
    text = text.replace(" ", "")
    return float(text) if "." in text else int(text)
