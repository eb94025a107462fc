"""From results of `qgraph.evaluate` to what is shown of them."""

from __future__ import annotations

import math
from collections.abc import Sequence

from qgraph.evaluate.comparison import Comparison, OutputError
from qgraph.evaluate.cost import Latency
from qgraph.evaluate.distributions import Divergence
from qgraph.evaluate.embeddings import MOST, EmbeddingComparison, Pool
from qgraph.evaluate.findings import Figure, Findings, Shown, Table
from qgraph.evaluate.isolated import TensorLoss, TensorLosses
from qgraph.evaluate.language import LanguageComparison, Perplexity
from qgraph.evaluate.statistics import Estimate
from qgraph.evaluate.tasks import AccuracyComparison
from qgraph.report import megabytes

INTERVALS = "Intervals are 95 % bootstrap intervals over samples (text windows), 2000 resamples."
ISOLATED = (
    "Isolated: every operator of the quantized model reads what the float model computed before it. "
    "Accumulated: it reads what the quantized model itself computed."
)
RIGHT = "Accuracy is the share of labelled predictions whose largest class is the label."
KL = "KL divergence is KL(float || quantized) over the classes of a prediction, in nats."


def decibels(value: float) -> str:
    """An SQNR; "exact" where nothing differs."""
    if math.isnan(value):
        return ""
    return "exact" if value == math.inf else f"{value:.1f} dB"


def interval(each: Estimate, form: str) -> str:
    """The interval of an estimate, "" where there is none."""
    if each.low is None or each.high is None:
        return ""
    return f"95 %: {each.low:{form}} to {each.high:{form}}"


def of_comparison(found: Comparison, float_model: str, quant_model: str, data: str) -> Findings:
    """`compare`: outputs, predictions, bytes, time."""
    figures = [
        Figure(
            "Size", f"{found.size_ratio:.2f}x",
            f"{megabytes(found.float_bytes)} → {megabytes(found.quant_bytes)}",
        )
    ]  # fmt: skip
    if found.bits_per_weight is not None:
        note = "scales, zero points and padding included"
        figures.append(Figure("Bits per weight", f"{found.bits_per_weight:.2f}", note))
    figures += _latency(found.latency)
    noise = [o.error.sqnr_db for o in found.outputs if o.error]
    if noise:
        figures.append(Figure("Worst output", decibels(min(noise)), "signal to noise"))
    judged = [o for o in found.outputs if o.divergence]
    for each in judged[:1]:
        assert each.divergence is not None
        figures += _divergence(each.divergence)
    how = ["SQNR is 10 log10(Σx² / Σ(x − y)²) over all samples.", INTERVALS]
    tables = [_outputs(found.outputs)]
    if judged:
        how.append(KL)
        tables.append(_predictions(judged))
    return Findings(
        "comparison", quant_model, float_model, [f"Data: {data}, {found.samples} samples.", *how],
        figures, tables, {**found.to_json(), "data": data},
    )  # fmt: skip


def _latency(found: Latency | None) -> list[Figure]:
    if found is None:
        return []
    note = f"quartiles {found.lower_quartile:.2f} to {found.upper_quartile:.2f}, {found.rounds} rounds by turns"
    return [Figure("Time", f"{found.ratio:.2f}x", note)]


def _divergence(found: Divergence) -> list[Figure]:
    return [
        Figure("KL divergence", f"{found.kl_mean.value:.3g}", f"nats, {interval(found.kl_mean, '.3g')}".rstrip(", ")),
        Figure("Same top-1", f"{found.agreement.value:.2%}", interval(found.agreement, ".2%")),
    ]  # fmt: skip


def _outputs(outputs: Sequence[OutputError]) -> Table:
    rows: list[tuple[Shown, ...]] = []
    for each in outputs:
        if each.error is None:
            equal = (f"{each.equal:.2%}", each.equal) if each.equal is not None else ""
            rows.append((each.name, "", "", "", "", equal))
            continue
        error = each.error
        rows.append(
            (
                each.name,
                (decibels(error.sqnr_db), error.sqnr_db),
                (f"{error.max_abs:.3g}", error.max_abs),
                (f"{error.cosine:.5f}", error.cosine),
                (str(error.broken), float(error.broken)),
                "",
            )
        )
    columns = ("Output", ">SQNR", ">Largest error", ">Cosine", ">Not finite", ">Equal elements")
    return Table("Outputs", columns, tuple(rows))


def _predictions(outputs: Sequence[OutputError]) -> Table:
    rows: list[tuple[Shown, ...]] = []
    for each in outputs:
        found = each.divergence
        assert found is not None
        rows.append((each.name, *_divergence_cells(found)))
    return Table("Predictions", ("Output", *_DIVERGENCE), tuple(rows))


_DIVERGENCE = (
    ">Predictions",
    ">Mean KL",
    "Interval",
    ">KL 99 %",
    ">KL worst",
    ">Same top-1",
    "Interval",
)


def _divergence_cells(found: Divergence) -> tuple[Shown, ...]:
    return (
        (f"{found.predictions:,}", float(found.predictions)),
        (f"{found.kl_mean.value:.3g}", found.kl_mean.value),
        interval(found.kl_mean, ".3g"),
        (f"{found.kl_p99:.3g}", found.kl_p99),
        (f"{found.kl_max:.3g}", found.kl_max),
        (f"{found.agreement.value:.2%}", found.agreement.value),
        interval(found.agreement, ".2%"),
    )


def of_perplexity(
    found: Perplexity | LanguageComparison, model: str, float_model: str, tokens: str, context: int
) -> Findings:
    """`perplexity` of one model, or `divergence` of two."""
    alone = found if isinstance(found, Perplexity) else found.quant_perplexity
    how = [
        f"Tokens: {tokens}, in {alone.windows} windows of {context} that do not overlap; a shorter rest is left out.",
        "Perplexity is exp of the mean of −log p over every token but the first of each window.",
    ]
    count = f"{alone.tokens:,} predictions"
    figures = [
        Figure("Perplexity", f"{alone.perplexity:.4f}", f"{alone.nll:.4f} nats per token, {count}")
    ]
    rows: list[tuple[Shown, ...]] = [_perplexity_row(model, alone)]
    tables = []
    if isinstance(found, LanguageComparison):
        ratio = alone.perplexity / found.float_perplexity.perplexity
        change = found.nll_change
        note = f"{change.value:+.4f} nats per token, {interval(change, '+.4f')}".rstrip(", ")
        figures += [
            Figure("Perplexity against float", f"{ratio:.4f}x", note),
            *_divergence(found.divergence),
        ]
        rows.insert(0, _perplexity_row(float_model, found.float_perplexity))
        how += [INTERVALS, KL]
        tables = [Table("Predictions", _DIVERGENCE, (_divergence_cells(found.divergence),))]
    models = Table("Models", ("Model", ">Perplexity", ">Nats per token"), tuple(rows))
    payload = {"tokens_from": tokens, "context": context, **found.to_json()}
    return Findings("perplexity", model, float_model, how, figures, [models, *tables], payload)


def _perplexity_row(model: str, found: Perplexity) -> tuple[Shown, ...]:
    return model, (f"{found.perplexity:.4f}", found.perplexity), (f"{found.nll:.4f}", found.nll)


def of_accuracy(
    found: Estimate | AccuracyComparison, model: str, float_model: str, data: str, count: int
) -> Findings:
    """`accuracy` of one model, or `accuracies` of two."""
    alone = found if isinstance(found, Estimate) else found.quant_accuracy
    how = [f"Data: {data}, {count} samples.", RIGHT, INTERVALS]
    figures = [Figure("Accuracy", f"{alone.value:.2%}", interval(alone, ".2%"))]
    payload = {"data": data, "samples": count}
    if isinstance(found, AccuracyComparison):
        before, change = found.float_accuracy, found.change
        how.append("The change is measured sample by sample, so its interval is that of pairs.")
        figures += [
            Figure("Accuracy of the float model", f"{before.value:.2%}", interval(before, ".2%")),
            Figure("Change", f"{change.value:+.2%}", interval(change, "+.2%")),
            Figure("Same top-1", f"{found.agreement.value:.2%}", interval(found.agreement, ".2%")),
        ]
        payload |= found.to_json()
    else:
        payload |= {"accuracy": {"value": alone.value, "low": alone.low, "high": alone.high}}
    return Findings("accuracy", model, float_model, how, figures, [], payload)


def of_embeddings(
    found: EmbeddingComparison, model: str, float_model: str, data: str, pool: Pool
) -> Findings:
    """`embeddings`."""
    how = [
        f"Data: {data}, {found.vectors} vectors of output {found.output!r}; hidden states are pooled ({pool}).",
        f"Rank correlation is Spearman's, of the similarities of all pairs of the first {MOST} vectors.",
        INTERVALS,
    ]
    figures = [
        Figure("Cosine to float", f"{found.cosine.value:.5f}", interval(found.cosine, ".5f")),
        Figure("Worst cosine", f"{found.worst_cosine:.5f}"),
    ]
    if not math.isnan(found.spearman):
        figures.append(Figure("Rank correlation with float", f"{found.spearman:.4f}"))
    if found.float_spearman is not None and found.quant_spearman is not None:
        how.append("Scores judge vectors 0 and 1, 2 and 3, …")
        change = found.quant_spearman - found.float_spearman
        note = f"{found.float_spearman:.4f} for the float model, {change:+.4f}"
        figures.append(Figure("Rank correlation with scores", f"{found.quant_spearman:.4f}", note))
    payload = {"data": data, "pool": pool, **found.to_json()}
    return Findings("embeddings", model, float_model, how, figures, [], payload)


def of_tensors(found: TensorLosses, model: str, float_model: str, data: str) -> Findings:
    """`tensor_losses`; the table holds all that lose anything."""
    worst = found.worst()
    how = [
        f"Data: {data}. SQNR is 10 log10(Σx² / Σ(x − y)²) over all samples, at each value inside the graph.",
        ISOLATED,
    ]
    if found.moved:
        how.append(
            f"{len(found.moved)} values share a name with the float model and hold something else, because a pass "
            "folded or moved a factor; they are left out. After smoothing or rotating compare with the float model of "
            "`qgraph optimize --stop-after PASS`."
        )
    exact = len(found.tensors) - len(worst)
    figures = [
        Figure(
            "Values compared", f"{len(found.tensors):,}", f"{exact:,} lose nothing by themselves"
        )
    ]
    if worst:
        first = worst[0]
        figures.append(Figure("Worst by itself", decibels(first.isolated.sqnr_db), first.operator))
    rows: tuple[tuple[Shown, ...], ...] = tuple(
        (
            t.name, _maker(t),
            (decibels(t.isolated.sqnr_db), t.isolated.sqnr_db),
            (decibels(t.accumulated.sqnr_db), t.accumulated.sqnr_db),
            (f"{t.isolated.max_abs:.3g}", t.isolated.max_abs),
            (f"{t.accumulated.cosine:.5f}", t.accumulated.cosine),
        )
        for t in worst
    )  # fmt: skip
    columns = (
        "Value",
        "Operator",
        ">Isolated",
        ">Accumulated",
        ">Largest error, isolated",
        ">Cosine, accumulated",
    )
    table = Table("Which layer hurts, the worst first", columns, rows)
    payload = {"data": data, **found.to_json()}
    return Findings("tensors", model, float_model, how, figures, [table], payload, found.tensors)


def _maker(loss: TensorLoss) -> str:
    """The operator, without its name where that of the value tells it."""
    kind, _, name = loss.operator.partition(" ")
    return kind if loss.name.startswith(name.strip("'")) else loss.operator
