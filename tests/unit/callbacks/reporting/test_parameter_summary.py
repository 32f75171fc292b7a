from lightning_softprompt.callbacks.reporting.parameter_summary import ParameterSummary, summarize_parameters
from lightning_softprompt.methods import FullFineTuning, PromptTuning
from lightning_softprompt.training.replicas import Replicas, ReplicaSpec


def test_the_line_names_the_method_and_counts_its_parameters_once(load):
    backbone = load("llama")
    frozen = sum(parameter.numel() for parameter in backbone.parameters())
    method = PromptTuning(length=3, backbone=backbone.spec)
    replicas = Replicas(PromptTuning(length=3, backbone=backbone.spec), ReplicaSpec(2))
    method.attach(backbone)
    replicas.replicas.attach(backbone, [1, 2])
    trainable = 3 * backbone.hidden_size
    for module, name, count in ((method, "PromptTuning", 1), (replicas, "2 replicas of PromptTuning", 2)):
        percent = 100 * count * trainable / (count * trainable + frozen)
        assert summarize_parameters(module) == (
            f"{name}: {count * trainable:,} trainable and {frozen:,} frozen parameters ({percent:.4g} % trainable)"
        )


def test_all_parameters_may_be_trainable(load):
    backbone = load("llama")
    method = FullFineTuning(backbone=backbone.spec)
    method.attach(backbone)
    lines = []
    ParameterSummary(lines.append).on_train_start(None, method)
    (line,) = lines
    assert line.startswith("FullFineTuning: ")
    assert line.endswith("trainable and 0 frozen parameters (100 % trainable)")
