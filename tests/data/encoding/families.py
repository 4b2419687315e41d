"""Twelve chat templates (three are bundled), each rendered a second time by hand: what masks are compared with.

A family is a template file (written from its public definition, shortened where it lists what no mask depends on), the
tokens its tokenizer has, and a function that writes a conversation piece by piece, saying which message's words each
piece is. Nothing here uses Jinja, the renderer, or anything it does.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from halfbyte.data.encoding import chatml
from halfbyte.data.reading.formats import ChatMessage

Pieces = list[tuple[str, int | None]]
"""Text, and the message whose words the model must write there; None for what it is given."""

TEMPLATES = Path(__file__).parent / "templates"
BUNDLED = Path(chatml.__file__).parent / "jinja"


@dataclass(frozen=True)
class Family:
    name: str
    write: Callable[[Sequence[ChatMessage], Any], Pieces]
    special: tuple[str, ...]
    """Special tokens, besides <s>, </s> and <pad>."""
    plain: tuple[str, ...] = ()
    """Added tokens that are not special."""
    bos: str = "<s>"
    eos: str = "</s>"
    system: bool = True
    tools: bool = False
    thinks: bool = False
    place: Path = TEMPLATES

    @property
    def template(self) -> str:
        return (self.place / f"{self.name}.jinja").read_text(encoding="utf-8")


def arguments(message: ChatMessage) -> list[tuple[str, str]]:
    calls = [c["function"] for c in message.more["tool_calls"]]
    return [(c["name"], json.dumps(c["arguments"], ensure_ascii=False)) for c in calls]


def thoughts(message: ChatMessage) -> str:
    return str(message.more.get("thinking", ""))


def with_system(messages: Sequence[ChatMessage]) -> tuple[str, list[tuple[int, ChatMessage]]]:
    numbered = list(enumerate(messages))
    return (messages[0].content, numbered[1:]) if messages[0].role == "system" else ("", numbered)


def llama2(messages: Sequence[ChatMessage], tools: Any) -> Pieces:
    system, talk = with_system(messages)
    head = f"<<SYS>>\n{system}\n<</SYS>>\n\n" if messages[0].role == "system" else ""
    pieces: Pieces = []
    for i, m in talk:
        if m.role == "user":
            pieces.append((f"<s>[INST] {(head + m.content).strip()} [/INST]", None))
            head = ""
        else:
            pieces.append((f" {m.content.strip()} </s>", i))
    return pieces


def llama3(messages: Sequence[ChatMessage], tools: Any) -> Pieces:
    def header(role: str) -> str:
        return f"<|start_header_id|>{role}<|end_header_id|>\n\n"

    system, talk = with_system(messages)
    dates = "Cutting Knowledge Date: December 2023\nToday Date: 26 Jul 2024\n\n"
    begin = f"<s>{header('system')}{'Environment: ipython' + chr(10) if tools else ''}{dates}{system.strip()}<|eot_id|>"
    pieces: Pieces = [(begin, None)]
    if tools:
        asked = talk.pop(0)[1].content.strip()
        listed = "".join(json.dumps(t, indent=4) + "\n\n" for t in tools)
        task = "Given the following functions, please respond with a JSON for a function call.\n\n"
        pieces.append((f"{header('user')}{task}{listed}{asked}<|eot_id|>", None))
    for i, m in talk:
        if m.role == "assistant":
            pieces.append((header("assistant"), None))
            if "tool_calls" in m.more:
                ((name, given),) = arguments(m)
                pieces.append((f'{{"name": "{name}", "parameters": {given}}}<|eot_id|>', i))
            else:
                pieces.append((f"{m.content.strip()}<|eot_id|>", i))
        elif m.role == "tool":
            pieces.append((f"{header('ipython')}{m.content}<|eot_id|>", None))
        else:
            pieces.append((f"{header(m.role)}{m.content.strip()}<|eot_id|>", None))
    return pieces


def _qwen_begin(system: str, tools: Any, default: str) -> str:
    said = system or default
    if tools:
        listed = "".join("\n" + json.dumps(t, ensure_ascii=False) for t in tools)
        gap = "\n\n" if said else ""
        end = "\n</tools>\n\nReturn a json object within <tool_call></tool_call> XML tags."
        return f"<|im_start|>system\n{said}{gap}# Tools\n\n<tools>{listed}{end}<|im_end|>\n"
    return f"<|im_start|>system\n{said}<|im_end|>\n" if said else ""


def _qwen_tool(messages: Sequence[ChatMessage], i: int) -> str:
    opens = messages[i - 1].role != "tool"
    closes = i + 1 == len(messages) or messages[i + 1].role != "tool"
    said = f"\n<tool_response>\n{messages[i].content}\n</tool_response>"
    return ("<|im_start|>user" if opens else "") + said + ("<|im_end|>\n" if closes else "")


def _qwen_calls(message: ChatMessage) -> list[str]:
    given = arguments(message)
    return [f'<tool_call>\n{{"name": "{name}", "arguments": {a}}}\n</tool_call>' for name, a in given]


def qwen2_5(messages: Sequence[ChatMessage], tools: Any) -> Pieces:
    system, talk = with_system(messages)
    default = "You are Qwen, created by Alibaba Cloud. You are a helpful assistant."
    pieces: Pieces = [(_qwen_begin(system, tools, default), None)]
    for i, m in talk:
        if m.role == "tool":
            pieces.append((_qwen_tool(messages, i), None))
        elif m.role == "assistant" and "tool_calls" in m.more:
            calls = "\n".join(([m.content] if m.content else []) + _qwen_calls(m))
            pieces += [("<|im_start|>assistant\n", None), (f"{calls}<|im_end|>", i), ("\n", None)]
        elif m.role == "assistant":
            pieces += [("<|im_start|>assistant\n", None), (f"{m.content}<|im_end|>", i), ("\n", None)]
        else:
            pieces.append((f"<|im_start|>{m.role}\n{m.content}<|im_end|>\n", None))
    return pieces


def qwen3(messages: Sequence[ChatMessage], tools: Any) -> Pieces:
    system, talk = with_system(messages)
    last_asked = max(i for i, m in talk if m.role == "user")
    pieces: Pieces = [(_qwen_begin(system, tools, ""), None)]
    for i, m in talk:
        if m.role == "tool":
            pieces.append((_qwen_tool(messages, i), None))
            continue
        if m.role != "assistant":
            pieces.append((f"<|im_start|>{m.role}\n{m.content}<|im_end|>\n", None))
            continue
        thought, said = thoughts(m), m.content
        if not thought and "</think>" in said:
            before, said = said.rsplit("</think>", 1)
            thought, said = before.rsplit("<think>", 1)[-1], said.lstrip("\n")
        if i > last_asked and (i == len(messages) - 1 or thought):
            said = f"<think>\n{thought.strip(chr(10))}\n</think>\n\n{said.lstrip(chr(10))}"
        if "tool_calls" in m.more:
            said += ("\n" if m.content else "") + "\n".join(_qwen_calls(m))
        pieces += [("<|im_start|>assistant\n", None), (f"{said}<|im_end|>", i), ("\n", None)]
    return pieces


def gemma(messages: Sequence[ChatMessage], tools: Any) -> Pieces:
    system, talk = with_system(messages)
    head = f"{system}\n\n" if messages[0].role == "system" else ""
    pieces: Pieces = [("<s>", None)]
    for i, m in talk:
        if m.role == "user":
            pieces.append((f"<start_of_turn>user\n{head}{m.content.strip()}<end_of_turn>\n", None))
            head = ""
        else:
            pieces += [("<start_of_turn>model\n", None), (f"{m.content.strip()}<end_of_turn>", i), ("\n", None)]
    return pieces


def mistral(messages: Sequence[ChatMessage], tools: Any) -> Pieces:
    system, talk = with_system(messages)
    last_asked = max(i for i, m in talk if m.role == "user")
    pieces: Pieces = [("<s>", None)]
    for i, m in talk:
        if m.role == "user":
            listed = f"[AVAILABLE_TOOLS] {json.dumps(tools, ensure_ascii=False)}[/AVAILABLE_TOOLS]" if tools else ""
            given = f"{system}\n\n" if messages[0].role == "system" else ""
            here = i == last_asked
            pieces.append((f"{listed if here else ''}[INST] {given if here else ''}{m.content}[/INST]", None))
        elif m.role == "tool":
            call = m.more["tool_call_id"]
            pieces.append((f'[TOOL_RESULTS] {{"content": {m.content}, "call_id": "{call}"}}[/TOOL_RESULTS]', None))
        elif "tool_calls" in m.more:
            ids = [c["id"] for c in m.more["tool_calls"]]
            calls = [
                f'{{"name": "{n}", "arguments": {a}, "id": "{d}"}}' for (n, a), d in zip(arguments(m), ids, strict=True)
            ]
            pieces.append((f"[TOOL_CALLS] [{', '.join(calls)}]</s>", i))
        else:
            pieces.append((f" {m.content.strip()}</s>", i))
    return pieces


def phi3(messages: Sequence[ChatMessage], tools: Any) -> Pieces:
    pieces: Pieces = []
    for i, m in enumerate(messages):
        if m.role == "assistant":
            pieces += [("<|assistant|>\n", None), (f"{m.content}<|end|>", i), ("\n", None)]
        else:
            pieces.append((f"<|{m.role}|>\n{m.content}<|end|>\n", None))
    return [*pieces, ("<|endoftext|>", None)]


def smollm2(messages: Sequence[ChatMessage], tools: Any) -> Pieces:
    default = "You are a helpful AI assistant named SmolLM, trained by Hugging Face"
    pieces: Pieces = [] if messages[0].role == "system" else [(f"<|im_start|>system\n{default}<|im_end|>\n", None)]
    for i, m in enumerate(messages):
        if m.role == "assistant":
            pieces += [("<|im_start|>assistant\n", None), (f"{m.content}<|im_end|>", i), ("\n", None)]
        else:
            pieces.append((f"<|im_start|>{m.role}\n{m.content}<|im_end|>\n", None))
    return pieces


def gpt_oss(messages: Sequence[ChatMessage], tools: Any) -> Pieces:
    system, talk = with_system(messages)
    begin = (
        "<|start|>system<|message|>You are ChatGPT, a large language model trained by OpenAI.\nReasoning: medium\n\n"
        "# Valid channels: analysis, commentary, final. Channel must be included for every message."
        + ("\nCalls to these tools must go to the commentary channel: 'functions'." if tools else "")
        + "<|end|>"
    )
    if system or tools:
        begin += "<|start|>developer<|message|>" + (f"# Instructions\n\n{system}\n\n" if system else "")
        if tools:
            names = "".join(f"type {t['function']['name']} = (_: any) => any;\n" for t in tools)
            begin += f"# Tools\n\nnamespace functions {{\n{names}}} // namespace functions"
        begin += "<|end|>"
    pieces: Pieces = [(begin, None)]
    called = ""
    for i, m in talk:
        later = [n for j, n in talk if j > i and n.role == "assistant" and "tool_calls" not in n.more]
        if m.role == "user":
            pieces.append((f"<|start|>user<|message|>{m.content}<|end|>", None))
        elif m.role == "tool":
            said = json.dumps(m.content, ensure_ascii=False)
            pieces.append(
                (f"<|start|>functions.{called} to=assistant<|channel|>commentary<|message|>{said}<|end|>", None)
            )
        elif "tool_calls" in m.more:
            (called, given), *_ = arguments(m)
            thought = (m.content or thoughts(m)) if not later else ""
            first = f"<|channel|>analysis<|message|>{thought}<|end|><|start|>assistant" if thought else ""
            call = f" to=functions.{called}<|channel|>commentary json<|message|>{given}<|call|>"
            pieces += [("<|start|>assistant", None), (first + call, i)]
        else:
            is_last = i == len(messages) - 1
            thought = thoughts(m) if is_last else ""
            first = f"<|channel|>analysis<|message|>{thought}<|end|><|start|>assistant" if thought else ""
            end = "<|return|>" if is_last else "<|end|>"
            pieces += [("<|start|>assistant", None), (f"{first}<|channel|>final<|message|>{m.content}{end}", i)]
    return pieces


def _think(message: ChatMessage) -> str:
    return f"<think>\n{thoughts(message)}\n</think>\n\n" if thoughts(message) else ""


HERMES_BEFORE = (
    "You are a function calling AI model. You are provided with function signatures within <tools></tools> XML tags. "
    "You may call one or more functions to assist with the user query. Don't make assumptions about what values to "
    "plug into functions.\n<tools>\n"
)
HERMES_AFTER = (
    "</tools>\nFor each function call return a JSON object with the function name and arguments within "
    '<tool_call></tool_call> XML tags:\n<tool_call>\n{"name": <function-name>, "arguments": <args-json-object>}\n'
    "</tool_call>"
)
QWEN_BEFORE = (
    "# Tools\n\nYou may call one or more functions to assist with the user query.\n\nYou are provided with function "
    "signatures within <tools></tools> XML tags:\n<tools>\n"
)
QWEN_AFTER = (
    "</tools>\n\nFor each function call, return a json object with function name and arguments within "
    '<tool_call></tool_call> XML tags:\n<tool_call>\n{"name": <function-name>, "arguments": <args-json-object>}\n'
    "</tool_call>"
)


def _in_chatml(messages: Sequence[ChatMessage], tools: Any, around: tuple[str, str], tool: str, kept: int) -> Pieces:
    """A conversation in ChatML. `around`: what stands around the tools; `tool`: who tells results; thoughts stand in
    messages behind `kept`."""
    system, talk = with_system(messages)
    listed = "".join(json.dumps(t, ensure_ascii=False) + "\n" for t in tools or ())
    before = "\n\n".join(p for p in (system, around[0] + listed + around[1] if tools else "") if p)
    pieces: Pieces = [(f"<|im_start|>system\n{before}<|im_end|>\n", None)] if before else []
    for i, m in talk:
        if m.role == "tool":
            said = f"<tool_response>\n{m.content}\n</tool_response>"
            begins, ends = messages[i - 1].role != "tool", i + 1 == len(messages) or messages[i + 1].role != "tool"
            opening = f"<|im_start|>{tool}\n" if begins else "\n"
            pieces.append((opening + said + ("<|im_end|>\n" if ends else ""), None))
        elif m.role == "assistant":
            calls = "\n".join(_qwen_calls(m)) if "tool_calls" in m.more else ""
            gap = "\n" if m.content and calls else ""
            said = (_think(m) if i > kept else "") + m.content + gap + calls
            pieces += [("<|im_start|>assistant\n", None), (f"{said}<|im_end|>", i), ("\n", None)]
        else:
            pieces.append((f"<|im_start|>{m.role}\n{m.content}<|im_end|>\n", None))
    return pieces


def chatml_tools(messages: Sequence[ChatMessage], tools: Any) -> Pieces:
    return _in_chatml(messages, tools, (HERMES_BEFORE, HERMES_AFTER), "tool", -1)


def qwen_tools(messages: Sequence[ChatMessage], tools: Any) -> Pieces:
    last_asked = max(i for i, m in enumerate(messages) if m.role == "user")
    return _in_chatml(messages, tools, (QWEN_BEFORE, QWEN_AFTER), "user", last_asked)


def llama3_tools(messages: Sequence[ChatMessage], tools: Any) -> Pieces:
    def header(role: str) -> str:
        return f"<|start_header_id|>{role}<|end_header_id|>\n\n"

    system, talk = with_system(messages)
    pieces: Pieces = []
    if tools:
        task = (
            "Given the following functions, please respond with a JSON for a function call with its proper arguments "
            'that best answers the given prompt.\n\nRespond in the format {"name": function name, "parameters": '
            "dictionary of argument name and its value}. Do not use variables. Separate several calls by "
            '"; ".\n'
        )
        listed = "".join("\n" + json.dumps(t, ensure_ascii=False) for t in tools)
        before = f"{system}\n\n" if system else ""
        pieces.append((f"{header('system')}Environment: ipython\n\n{before}{task}{listed}<|eot_id|>", None))
    elif system:
        pieces.append((f"{header('system')}{system}<|eot_id|>", None))
    for i, m in talk:
        if m.role == "assistant":
            given = arguments(m) if "tool_calls" in m.more else []
            calls = "; ".join(f'{{"name": "{name}", "parameters": {a}}}' for name, a in given)
            gap = "\n" if m.content and calls else ""
            pieces += [(header("assistant"), None), (f"{_think(m)}{m.content}{gap}{calls}<|eot_id|>", i)]
        else:
            role = "ipython" if m.role == "tool" else m.role
            pieces.append((f"{header(role)}{m.content}<|eot_id|>", None))
    return pieces


IM = ("<|im_start|>", "<|im_end|>")
LLAMA3 = ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")
QWEN = ("<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>")
FAMILIES = {
    f.name: f
    for f in (
        Family("llama2", llama2, ()),
        Family("llama3", llama3, LLAMA3, tools=True),
        Family("qwen2_5", qwen2_5, IM, QWEN, eos="<|im_end|>", tools=True),
        Family("qwen3", qwen3, IM, (*QWEN, "<think>", "</think>"), eos="<|im_end|>", tools=True, thinks=True),
        Family("gemma", gemma, ("<start_of_turn>", "<end_of_turn>")),
        Family(
            "mistral", mistral,
            ("[INST]", "[/INST]", "[TOOL_CALLS]", "[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]", "[TOOL_RESULTS]",
             "[/TOOL_RESULTS]"),
            tools=True,
        ),
        Family(
            "phi3", phi3, ("<|system|>", "<|user|>", "<|assistant|>", "<|end|>", "<|endoftext|>"), eos="<|endoftext|>"
        ),
        Family("smollm2", smollm2, IM, eos="<|im_end|>"),
        Family(
            "gpt_oss", gpt_oss,
            ("<|start|>", "<|message|>", "<|channel|>", "<|end|>", "<|return|>", "<|call|>"), eos="<|return|>",
            tools=True, thinks=True,
        ),
        Family("chatml-tools", chatml_tools, IM, eos="<|im_end|>", tools=True, thinks=True, place=BUNDLED),
        Family("qwen-tools", qwen_tools, IM, QWEN, eos="<|im_end|>", tools=True, thinks=True, place=BUNDLED),
        Family("llama3-tools", llama3_tools, LLAMA3, tools=True, thinks=True, place=BUNDLED),
    )
}  # fmt: skip


def reference(
    family: Family, messages: Sequence[ChatMessage], tools: Any, mask: str, tokenizer: Any
) -> tuple[list[int], list[int]]:
    """(ids, labels) of a conversation: its pieces joined where the label does not change, each tokenised alone."""
    last = len(messages) - 1
    ids: list[int] = []
    labels: list[int] = []
    joined: list[tuple[str, bool, bool]] = []
    for text, owner in family.write(messages, tools):
        trained = owner is not None and messages[owner].train and (mask == "assistant" or owner == last)
        labelled = mask == "all" or trained
        answer = owner == last  # generation starts here, so no token crosses this edge, whatever is labelled
        if joined and joined[-1][1:] == (labelled, answer):
            joined[-1] = (joined[-1][0] + text, labelled, answer)
        else:
            joined.append((text, labelled, answer))
    for text, labelled, _ in joined:
        part = tokenizer(text, add_special_tokens=False).input_ids
        ids += part
        labels += part if labelled else [-100] * len(part)
    labels[0] = -100
    return ids, labels
