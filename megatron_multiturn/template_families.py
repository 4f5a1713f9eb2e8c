"""The built-in templates, by name.

    firefly     <s>input1</s>target1</s>input2</s>target2</s>
    plain       <s>input1\\ntarget1</s>input2\\ntarget2</s>
    chatml      <|im_start|>role\\ncontent<|im_end|>\\n
    llama3      <s><|start_header_id|>role<|end_header_id|>\\n\\ncontent<|eot_id|>
    llama2      <s>[INST] <<SYS>>\\nsystem\\n<</SYS>>\\n\\ninput1 [/INST] target1 </s><s>...
    mistral     <s>[INST]input1[/INST]target1</s>, with [INST] a token of the vocabulary
    mistral-v1  <s> [INST] input1 [/INST] target1</s>, with [INST] as text
    alpaca      <s>Below is an instruction ...\\n\\n### Instruction:\\ninput1\\n\\n### Response:\\n
                target1</s>\\n\\n### Instruction: ...
    vicuna      <s>A chat between ... USER: input1 ASSISTANT: target1</s>USER: input2 ...
    chatglm     [Round 0]\\n问：input1\\n答：target1</s>\\n[Round 1] ...
    chatglm2    [gMASK]sop[Round 1]\\n\\n问：input1\\n\\n答：target1</s>[Round 2] ...

`<s>` and `</s>` are whatever begins and ends a text in the tokenizer's vocabulary. firefly and
plain have no mark for roles: all messages between two answers are one input, joined by "\\n", and a
system message is the first line of the first input.
"""

from megatron_multiturn.round_templates import RoundTemplate
from megatron_multiturn.sessions import Message
from megatron_multiturn.templates import (
    BOS,
    EOS,
    MessageParts,
    Part,
    Special,
    Template,
    closed_runs,
    stripped_runs,
)

IM_START = Special(token="<|im_start|>")
IM_END = Special(token="<|im_end|>")
START_HEADER = Special(token="<|start_header_id|>")
END_HEADER = Special(token="<|end_header_id|>")
END_OF_TURN = Special(token="<|eot_id|>")
INST = Special(token="[INST]")
INST_END = Special(token="[/INST]")
GMASK = Special(token="[gMASK]")
SOP = Special(token="sop")

_ALPACA_SYSTEM = (
    "Below is an instruction that describes a task. "
    "Write a response that appropriately completes the request."
)
_VICUNA_SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)


def _firefly_message(message: Message, following: Message | None) -> MessageParts:
    if message.role == "assistant":
        return closed_runs(message.runs(), EOS)
    if following is not None and following.role != "assistant":
        return [(message.content + "\n", False)]
    return [(message.content, False), (EOS, False)]


def _plain_message(message: Message, _following: Message | None) -> MessageParts:
    if message.role == "assistant":
        return closed_runs(message.runs(), EOS)
    return [(message.content + "\n", False)]


def _chatml_message(message: Message, _following: Message | None) -> MessageParts:
    return [
        (IM_START, False),
        (message.role + "\n", False),
        *closed_runs(message.runs(), IM_END),
        ("\n", False),
    ]


def _llama3_message(message: Message, _following: Message | None) -> MessageParts:
    return [
        (START_HEADER, False),
        (message.role, False),
        (END_HEADER, False),
        ("\n\n", False),
        *closed_runs(stripped_runs(message), END_OF_TURN),
    ]


def _llama2_question(_number: int, system: str, question: str) -> tuple[Part, ...]:
    head = f"<<SYS>>\n{system}\n<</SYS>>\n\n" if system else ""
    return (BOS, f"[INST] {head}{question} [/INST]")


def _mistral_question(_number: int, system: str, question: str) -> tuple[Part, ...]:
    return (INST, _led(system, question), INST_END)


def _mistral_v1_question(_number: int, system: str, question: str) -> tuple[Part, ...]:
    return (f" [INST] {_led(system, question)} [/INST]",)


def _led(system: str, question: str) -> str:
    return f"{system}\n\n{question}" if system else question


def _alpaca_question(_number: int, _system: str, question: str) -> tuple[Part, ...]:
    return (f"### Instruction:\n{question}\n\n### Response:\n",)


def _vicuna_question(_number: int, _system: str, question: str) -> tuple[Part, ...]:
    return (f"USER: {question} ASSISTANT:",)


def _chatglm_question(number: int, _system: str, question: str) -> tuple[Part, ...]:
    return (f"[Round {number - 1}]\n问：{question}\n答：",)


def _chatglm2_question(number: int, _system: str, question: str) -> tuple[Part, ...]:
    return (f"[Round {number}]\n\n问：{question}\n\n答：",)


_MESSAGE_TEMPLATES = (
    Template(name="firefly", specials=(BOS, EOS), opening=(BOS,), render_message=_firefly_message),
    Template(name="plain", specials=(BOS, EOS), opening=(BOS,), render_message=_plain_message),
    Template(
        name="chatml",
        specials=(IM_START, IM_END),
        trains_any_role=True,
        render_message=_chatml_message,
    ),
    Template(
        name="llama3",
        specials=(BOS, START_HEADER, END_HEADER, END_OF_TURN),
        opening=(BOS,),
        strips=True,
        trains_any_role=True,
        render_message=_llama3_message,
    ),
)

_ROUND_TEMPLATES = (
    RoundTemplate(
        name="llama2",
        specials=(BOS, EOS),
        write_question=_llama2_question,
        before_answer=" ",
        after_answer=" ",
        strips=True,
    ),
    RoundTemplate(
        name="mistral",
        specials=(BOS, EOS, INST, INST_END),
        opening=(BOS,),
        write_question=_mistral_question,
    ),
    RoundTemplate(
        name="mistral-v1",
        specials=(BOS, EOS),
        opening=(BOS,),
        write_question=_mistral_v1_question,
        before_answer=" ",
    ),
    RoundTemplate(
        name="alpaca",
        specials=(BOS, EOS),
        opening=(BOS,),
        write_question=_alpaca_question,
        write_system=lambda system: system + "\n\n",
        default_system=_ALPACA_SYSTEM,
        after_closing="\n\n",
    ),
    RoundTemplate(
        name="vicuna",
        specials=(BOS, EOS),
        opening=(BOS,),
        write_question=_vicuna_question,
        write_system=lambda system: system + " ",
        default_system=_VICUNA_SYSTEM,
        before_answer=" ",
    ),
    RoundTemplate(
        name="chatglm",
        specials=(EOS,),
        write_question=_chatglm_question,
        write_system=lambda system: system + "\n",
        after_closing="\n",
    ),
    RoundTemplate(
        name="chatglm2",
        specials=(EOS, GMASK, SOP),
        opening=(GMASK, SOP),
        write_question=_chatglm2_question,
        write_system=lambda system: system + "\n\n",
    ),
)

TEMPLATES: dict[str, Template | RoundTemplate] = {
    template.name: template for template in (*_MESSAGE_TEMPLATES, *_ROUND_TEMPLATES)
}
