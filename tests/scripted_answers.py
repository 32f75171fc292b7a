"""A language model with scripted answers, and passes of an evaluation over batches of examples."""

import json

import tiny
import torch


class ScriptedModel:
    """A language model that generates a fixed answer for each row id, whatever the row contains.

    Args:
        backbone: Its codec encodes the answers.
        answers: The answer of each row id. They are generated in lower case, as the tiny vocabulary requires.
    """

    def __init__(self, backbone, answers):
        self.backbone, self.answers = backbone, answers
        self.row_ids = []  # of each batch for which answers were generated

    def generate(self, batch, **options):
        self.row_ids.append(list(batch.row_ids))
        return encode_answers(self.backbone.codec, [self.answers[row].lower() for row in batch.row_ids])


def encode_answers(codec, answers):
    """Returns the token ids of answers [B, T], as a model generates them: with an end of sequence and padding."""
    ids = [torch.tensor([*codec.ids(answer), tiny.EOS]) for answer in answers]
    return torch.nn.utils.rnn.pad_sequence(ids, batch_first=True, padding_value=tiny.PAD)


def random_sentence(generator, low, high):
    """Returns `low` to `high` random words without punctuation."""
    num_words = generator.randint(low, high)
    return " ".join(generator.choices(tiny.WORDS[:-5], k=num_words))


def make_batches(codec, template, examples, size=4, row_ids=None):
    """Returns batches of at most `size` examples, in the order of the row ids."""
    row_ids = list(range(len(examples))) if row_ids is None else row_ids
    batches = []
    for start in range(0, len(row_ids), size):
        part = row_ids[start : start + size]
        selected = [examples[row] for row in part]
        rows = [codec.encode(template.pieces(example.fields), example.target, 40) for example in selected]
        batches.append(codec.collate(rows, row_ids=part, examples=selected))
    return batches


def evaluate(evaluation, lm, batches, stage="test", epoch=0):
    """Returns the metrics and the records of one pass over the batches."""
    evaluation.begin(stage, epoch)
    records = [record for batch in batches for record in evaluation.update(lm, batch)]
    return compute_metrics(evaluation), records


def compute_metrics(evaluation):
    """Returns the metrics of an evaluation as numbers."""
    return {name: float(value) for name, value in evaluation.compute().items()}


def evaluate_in_processes(evaluation, lm, batches_by_rank, folder):
    """Evaluates the batches of each rank in its own process.

    Returns for each rank the metrics, the metrics computed a second time, and the sorted names of the figures.
    """
    arguments = (evaluation, lm, batches_by_rank, folder)
    torch.multiprocessing.start_processes(_evaluate_rank, arguments, nprocs=len(batches_by_rank), start_method="fork")
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(len(batches_by_rank))]


def _evaluate_rank(rank, evaluation, lm, batches_by_rank, folder):
    store, world_size = f"file://{folder}/store", len(batches_by_rank)
    torch.distributed.init_process_group("gloo", store, rank=rank, world_size=world_size)
    metrics, _ = evaluate(evaluation, lm, batches_by_rank[rank])
    results = [metrics, compute_metrics(evaluation), sorted(evaluation.figures())]
    (folder / f"{rank}.json").write_text(json.dumps(results))
    torch.distributed.destroy_process_group()
