"""Why one row of a dataset is not what LLaMA-Factory's formats alpaca, sharegpt and openai expect."""

from __future__ import annotations

import json
from typing import Any


def row_problem(row: dict[str, Any], attributes: Any, stage: str) -> str | None:
    """The key and what is wrong under it, for the first thing on which LLaMA-Factory fails or for which it drops the row."""
    problem = (
        _alpaca(row, attributes, stage) if attributes.formatting == "alpaca" else _messages(row, attributes, stage)
    )
    return problem or _system_and_tools(row, attributes, stage)


def shown(value: Any) -> str:
    """A value in a message, shortened."""
    text = "null" if value is None else repr(value)
    return text if len(text) <= 60 else f"{text[:60]}..."


def _text_problem(row: dict[str, Any], column: str | None, may_be_null: bool) -> str | None:
    value = row.get(column) if column else None
    if not column or isinstance(value, str) or (value is None and may_be_null):
        return None
    return f"{column!r} must be text, found {shown(value)}"


def _alpaca(row: dict[str, Any], attributes: Any, stage: str) -> str | None:
    problem = _text_problem(row, attributes.prompt, True) or _text_problem(row, attributes.query, True)
    if attributes.ranking:
        answers = (attributes.chosen, attributes.rejected)
        problem = problem or next(filter(None, (_text_problem(row, column, False) for column in answers)), None)
    elif problem is None and stage != "pt":
        if not attributes.response:
            return "columns in dataset_info.json names no response, so there is no answer"
        problem = _text_problem(row, attributes.response, False)
    return problem or _history(row, attributes)


def _history(row: dict[str, Any], attributes: Any) -> str | None:
    history = row.get(attributes.history) if attributes.history else None
    for number, turn in enumerate(history if isinstance(history, list) else []):
        if not isinstance(turn, list) or len(turn) != 2 or not all(isinstance(text, str) for text in turn):
            return f"{attributes.history!r}, turn {number}: expected [prompt, answer], found {shown(turn)}"
    return None


def _messages(row: dict[str, Any], attributes: Any, stage: str) -> str | None:
    key = attributes.messages
    messages = row.get(key) if key else None
    if not isinstance(messages, list):
        return f"{key!r} must be a list of messages, found {shown(messages)}"
    if not messages:
        return f"{key!r} is empty"
    for number, message in enumerate(messages):
        problem = _message(message, attributes)
        if problem:
            return f"{key!r}, message {number}: {problem}"
    problem = _order(messages, attributes, key)
    if problem or not attributes.ranking:
        return problem
    answers = (attributes.chosen, attributes.rejected)
    return next(filter(None, (_answer(row.get(column), attributes, column) for column in answers)), None)


def _answer(message: Any, attributes: Any, key: str) -> str | None:
    """The chosen or the rejected answer to a conversation: one message."""
    problem = _message(message, attributes)
    if problem:
        return f"{key!r}: {problem}"
    role, allowed = message[attributes.role_tag], (attributes.assistant_tag, attributes.function_tag)
    if role in allowed:
        return None
    names = " or ".join(repr(tag) for tag in allowed if tag)
    return f"{key!r}: {attributes.role_tag!r} must be {names}, found {shown(role)}"


def _message(message: Any, attributes: Any) -> str | None:
    role_tag, content_tag = attributes.role_tag, attributes.content_tag
    if not isinstance(message, dict):
        return f"expected {{{role_tag!r}: ..., {content_tag!r}: ...}}, found {shown(message)}"
    given = {key: value for key, value in message.items() if value is not None}
    if attributes.formatting == "openai" and given.get("tool_calls"):
        return None
    for tag in (role_tag, content_tag):
        if tag not in given and role_tag not in given:  # a key that some rows have is null in the others
            return f"no {tag!r}; it has {', '.join(map(repr, given)) or 'nothing'}{_tags_hint(given)}"
    role, content = message.get(role_tag), message.get(content_tag)
    if not isinstance(content, str):
        return f"{content_tag!r} must be text, found {shown(content)}"
    if role == attributes.function_tag and (problem := _function_problem(content)):
        return f"{content_tag!r} of a {role} {problem}"
    return None


def _tags_hint(message: dict[str, Any]) -> str:
    if {"role", "content"} <= set(message):
        tags = '"role_tag": "role", "content_tag": "content", "user_tag": "user", "assistant_tag": "assistant"'
        return f'; set "tags": {{{tags}, "system_tag": "system"}} in dataset_info.json'
    return "; set role_tag and content_tag in dataset_info.json"


def _function_problem(content: str) -> str | None:
    try:
        calls = json.loads(content)
    except json.JSONDecodeError as error:
        return f"is not JSON: {error.msg} (column {error.colno}): {shown(content)}"
    for call in calls if isinstance(calls, list) else [calls]:
        if not isinstance(call, dict) or not {"name", "arguments"} <= set(call):
            return f"must have 'name' and 'arguments', found {shown(call)}"
    return None


def _order(messages: list[dict[str, Any]], attributes: Any, key: str) -> str | None:
    """Roles that do not alternate, beginning with the user's and ending with an answer."""
    role_tag, odd = attributes.role_tag, (attributes.user_tag, attributes.observation_tag)
    even = (attributes.assistant_tag, attributes.function_tag)
    first = 1 if attributes.system_tag and messages[0][role_tag] == attributes.system_tag else 0
    turns = [message[role_tag] for message in messages[first:]]
    if attributes.formatting == "openai":  # answers of several tools are one turn
        pairs = zip(turns, [None, *turns], strict=False)
        turns = [role for role, before in pairs if role != attributes.observation_tag or before != role]
    for number, role in enumerate(turns):
        allowed = (odd, even)[number % 2]
        if role not in allowed:
            names = " or ".join(repr(tag) for tag in allowed if tag)
            return f"{key!r}, message {number + first}: {role_tag!r} must be {names} there, found {shown(role)}"
    if attributes.ranking and turns and len(turns) % 2 == 0:
        asked = " or ".join(repr(tag) for tag in odd if tag)
        return f"{key!r}: the last message is {turns[-1]!r}; one of {asked} must come last, which the pair answers"
    if len(turns) % 2 and not attributes.ranking:
        return f"{key!r}: the last message is {turns[-1]!r}; an answer of {even[0]!r} must come last"
    return None if turns else f"{key!r} has no turn but {messages[0][role_tag]!r}"


def _system_and_tools(row: dict[str, Any], attributes: Any, stage: str) -> str | None:
    problem = _text_problem(row, attributes.system, True)
    tools = row.get(attributes.tools) if attributes.tools else None
    if problem or not tools or stage == "pt":
        return problem
    key = attributes.tools
    if not isinstance(tools, str):
        return None if attributes.formatting == "openai" else f"{key!r} must be JSON as text, found {shown(tools)}"
    try:
        parsed = json.loads(tools)
    except json.JSONDecodeError as error:
        return f"{key!r} is not JSON: {error.msg} (column {error.colno}): {shown(tools)}"
    if not isinstance(parsed, list):
        return f"{key!r} must be a list of tools as JSON, found {shown(tools)}"
    for tool in parsed:
        inner = tool.get("function", tool) if isinstance(tool, dict) else tool
        if not isinstance(inner, dict) or "name" not in inner:
            return f"{key!r}: a tool must have 'name', found {shown(tool)}"
    return None
