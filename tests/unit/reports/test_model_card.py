"""The model card of a prompt."""

import re

from lightning_softprompt.reports.model_card import model_card

BACKBONE = {"name": "smollm2-135m-instruct", "fingerprint": "abc123"}
CLASSES = {"init_args": {"words": {"bad": [" negative", " poor"]}, "template": "{soft}{text}\nIt was {target}"}}
METHOD = {"_class_path": "lightning_softprompt.methods.input_prompts.prompt_tuning.PromptTuning", "classes": CLASSES}
ROWS = {"": {"template": "{soft}{text}\nIt was {target}"}}
TRAINING = {
    "version": "0.2.0", "seed": 7, "step": 80, "readout": "LabelWords",
    "parameters": {"trainable": 11_520, "frozen": 88_480},
    "data": {"class_path": "x.ClassificationDataModule", "path": "data/sst2", "digest": "d1935"},
    "metrics": {"val/accuracy": {"value": 0.9, "low": 0.8256, "high": 0.9448, "rows": 100}, "val/loss": {"value": 2.5}},
}  # fmt: skip


def card(**changes):
    arguments = {"backbone": BACKBONE, "method": METHOD, "rows": ROWS, "training": TRAINING, **changes}
    return model_card("prompt.safetensors", **arguments)


def test_card_has_what_the_file_states():
    text = card()
    parts = (
        "<code>PromptTuning</code>", "smollm2-135m-instruct", "abc123", "11,520 of 100,000 (11.5200 %)", "data/sst2",
        "0.9000 (95 % interval 0.8256 to 0.9448, 100 rows)", "| <code>val/loss</code> | 2.5000 |", "SoftPrompt 0.2.0.",
        "| class bad | <code>negative</code>, <code>poor</code> |", "<code>{soft}{text}\\nIt was {target}</code>",
        "| readout | <code>LabelWords</code> |", "| seed | 7 |", "d1935",
        'sp.load_prompt("prompt.safetensors")', 'prompt.predict(["..."])',
    )  # fmt: skip
    missing = [part for part in parts if part not in text]
    assert not missing


def test_rows_with_columns_and_tasks_are_shown_as_code():
    rows = {"nli": {"template": "{premise} {the hypothesis}{target}"}}
    assert 'predict([{"premise": "...", "the hypothesis": "..."}], task="nli")' in card(rows=rows)


def test_files_of_earlier_versions_have_a_card():
    text = card(rows={}, training={})
    assert "{soft}{text}\\nIt was {target}" in text
    assert "No validation was run at this step." in text
    assert "Lightning SoftPrompt of an earlier version" in text


def test_the_front_matter_names_backbones_of_the_hub_only():
    assert "base_model" not in card()
    assert "\nbase_model: org/model-7b\n" in card(backbone={**BACKBONE, "name": "org/model-7b"})
    assert "base_model" not in card(backbone={**BACKBONE, "name": "org/model\nlicense: mit"})


def test_texts_of_others_are_no_markup():
    name = "x|`<script>`\u202e\n# title"
    rows = {"```": {"template": "{a`b}{c}{target}"}}
    text = card(backbone={**BACKBONE, "name": name}, rows=rows, training={"data": {"path": name}, "readout": name})
    assert "<script>" not in text
    assert "\u202e" not in text
    assert "\n# title" not in text
    code = re.search(r"```python\n(.*?)```", text, re.DOTALL)[1]
    assert r'{"a\x60b": "...", "c": "..."}], task="\x60\x60\x60")' in code
