"""Kinds of PEFT adapters that become prompts, one file each."""

from lightning_softprompt.interchange.adapters.base import AdapterKind
from lightning_softprompt.interchange.adapters.keys_values import KeyValueAdapter
from lightning_softprompt.interchange.adapters.multitask import MultitaskAdapter
from lightning_softprompt.interchange.adapters.tokens import TokenAdapter

KINDS: tuple[AdapterKind, ...] = (TokenAdapter(), KeyValueAdapter(), MultitaskAdapter())
