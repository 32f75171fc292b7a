"""Values on the command line mean what they mean in a file."""

import lightning_softprompt.data.rag_qa  # noqa: F401  the option names its class
from lightning_softprompt.data.datamodule import SoftPromptDataModule
from lightning_softprompt.parser import Parser
from lightning_softprompt.retrieval.settings import IndexSettings


def test_null_in_a_nested_option_is_no_text():
    parser = Parser(exit_on_error=False)
    parser.add_subclass_arguments(SoftPromptDataModule, "data")
    index = ["--data.index_settings.encoder", "null", "--data.index_settings.language", "none"]
    given = parser.parse_args(["--data", "RagQaDataModule", *index, "--data.gold_at", "1", "--data.gold_at", "null"])
    settings = given.data.init_args.index_settings
    assert (settings.encoder, settings.language, given.data.init_args.gold_at) == (None, "none", None)
    assert IndexSettings(**settings.as_dict()).encoder is None
