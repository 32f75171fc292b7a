"""The model card of a prompt."""

from lightning_softprompt.reports.model_card import model_card

BACKBONE = {"name": "smollm2-135m-instruct", "fingerprint": "abc123"}
METHOD = {"_class_path": "lightning_softprompt.methods.input_prompts.prompt_tuning.PromptTuning", "length": 20}
CONFIG = {
    "data": {"class_path": "ClassificationDataModule", "init_args": {"path": "data/sst2", "template": "{soft}{text}"}}
}
REPORT = {
    "trainable_parameters": 11_520, "frozen_parameters": 88_480, "global_step": 120, "validation_rows": 100,
    "best": {"metric": "val/accuracy", "value": 0.9, "global_step": 80},
}  # fmt: skip


def card(**changes):
    arguments = {"backbone": BACKBONE, "method": METHOD, "config": CONFIG, "report": REPORT, **changes}
    return model_card("prompt.safetensors", **arguments, version="0.2.0")


def test_card_names_method_backbone_data_and_metrics():
    text = card()
    parts = (
        "<code>PromptTuning</code>", "smollm2-135m-instruct", "abc123", "11,520 of 100,000 (11.5200 %)", "data/sst2",
        "0.9000 (95 % interval 0.8256 to 0.9448, 100 rows)", "--init_from prompt.safetensors",
    )  # fmt: skip
    for part in parts:
        assert part in text


def test_card_without_validation_or_known_rows():
    assert "No validation was run." in card(report={**REPORT, "best": None})
    assert "| <code>val/accuracy</code> | 0.9000 |" in card(report={**REPORT, "validation_rows": None})
    loss = {"metric": "val/loss", "value": 0.9, "global_step": 80}
    assert "| <code>val/loss</code> | 0.9000 |" in card(report={**REPORT, "best": loss})


def test_texts_of_others_are_no_markup():
    name = "x|`<script>`\u202e\n# title"
    text = card(backbone={**BACKBONE, "name": name}, config={"data": {"init_args": {"path": name}}})
    assert "<script>" not in text
    assert "\u202e" not in text
    assert "\n# title" not in text
