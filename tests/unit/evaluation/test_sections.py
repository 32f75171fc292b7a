"""The metrics that W&B shows apart from the others."""

from lightning_softprompt.evaluation.by_task import EvaluationByTask
from lightning_softprompt.evaluation.classification import ClassificationEvaluation
from lightning_softprompt.evaluation.multiple_choice import ChoiceEvaluation
from lightning_softprompt.evaluation.qa import QaEvaluation


def test_metrics_of_classes_and_of_retrieval_have_sections():
    classes, choices, answers = ClassificationEvaluation(("a", "b")), ChoiceEvaluation(("a", "b")), QaEvaluation()
    assert classes.sections["retrieval"] == ()
    assert "precision/a" in classes.sections["by_class"]
    assert choices.sections["by_class"] == classes.sections["by_class"]
    assert "precision@1" in choices.sections["retrieval"]
    assert answers.sections["by_class"] == ()
    assert "precision" not in answers.sections["retrieval"]
    for evaluation in (classes, choices, answers):
        logged = set(evaluation.logged)
        assert all(set(metrics) <= logged for metrics in evaluation.sections.values())


def test_metrics_of_several_tasks_have_sections():
    evaluation = EvaluationByTask({"moods": ClassificationEvaluation(("a", "b")), "facts": QaEvaluation()})
    assert "moods/f1/b" in evaluation.sections["by_class"]
    assert "facts/mrr" in evaluation.sections["retrieval"]
