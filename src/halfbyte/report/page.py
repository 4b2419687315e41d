"""`report.html`: one file that opens anywhere, without network and without a library.

Everything that comes from rows, recipes or names passes through Jinja's autoescape; the page's policy allows only its
own script, named by its hash, and loads nothing.
Cost: about a tenth of a second, and a second for 200,000 steps; no torch but for the adapter's norms.
"""

import base64
import contextlib
import hashlib
import logging
import time
from collections.abc import Iterator, Sequence
from functools import cache
from itertools import groupby
from pathlib import Path

import numpy as np
from jinja2 import Environment, Undefined
from markupsafe import Markup

from halfbyte.recipe.fields import shown
from halfbyte.report import curves, plots, record
from halfbyte.report.current import is_current
from halfbyte.report.series import Series
from halfbyte.runs.folder import RunFolder
from halfbyte.scoring.intervals import CONFIDENCE
from halfbyte.system import files
from halfbyte.system.words import duration
from halfbyte.types import Document
from halfbyte.web import files as web

MAX_TEXT = 1_200  # characters of an answer, a prompt or a notice
_log = logging.getLogger(__name__)


def write(run: Path, out: Path | None = None, *, ours: bool = False) -> Path:
    """Make the page of a run; returns its file, `report.html` in the run's folder unless `out` names another."""
    page = out or RunFolder(run).page
    files.write(page, html(record.read(run, ours=ours)).encode())
    return page


@contextlib.contextmanager
def at_end(run: RunFolder) -> Iterator[None]:
    """Make the page when the block ends, however it ends. A page that cannot be made ends no run."""
    try:
        yield
    finally:
        renew(run.path, ours=True)


def mend(run: RunFolder) -> None:
    """What a process that was killed between the report and the end has left of a finished run: the page is made where
    it is older than what it is made of, and temporary files go."""
    with contextlib.suppress(OSError):  # a run that nobody may write
        files.clear_dead(run.path)
        if not is_current(run):
            renew(run.path)


def renew(run: Path, *, ours: bool = False) -> None:
    """Make the page anew; that it cannot be made is only a warning."""
    try:
        write(run, ours=ours)
    except Exception as error:
        _log.warning(f"{RunFolder(run).page} could not be made: {type(error).__name__}: {error}")


def html(run: record.Record, *, live: bool = False) -> str:
    """The page. `live`: it asks for itself again every few seconds."""
    heat, norms = None, run.update_norms
    if norms is not None:
        layers = [f"layer {n}" if n != "-" else "outside" for n in norms.layers]
        heat = plots.heat_map("Norm of each update, scale x |BA|", layers, norms.kinds, norms.norms)
    return render(
        "run.html", curves.of_run(run), live=live, run=run, heat=heat, pictures=of_scores(run.scores),
        facts=facts(run), summary=summary(run),
        most_rows=max((part["rows"] for part in run.started.get("histogram") or []), default=1),
        confidence=CONFIDENCE,
    )  # fmt: skip


def render(name: str, charts: Sequence[plots.Chart], **values: object) -> str:
    """A template of `web/` as a page; the first chart is drawn wide too."""
    script = web.text("tip.js") + (plots.WEB / "page.js").read_text(encoding="utf-8")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    policy = f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{digest}'; connect-src 'self'"
    ours = {"script": Markup(script), "style": Markup(web.text("style.css"))}  # files of this package  # nosec B704
    drawn: Document = {"charts": [plots.svg(chart) for chart in charts]}
    if charts:
        drawn["wide"] = plots.svg(charts[0], width=900, height=320)
    now = time.strftime("%Y-%m-%d %H:%M")
    return environment().get_template(name).render(**ours, **drawn, policy=policy, made=now, **values)


@cache
def environment() -> Environment:
    jinja = plots.templates()
    jinja.filters |= {"gb": gb, "shown": shown, "cut": cut, "number": number, "beside": beside}
    return jinja


def facts(run: record.Record) -> list[tuple[str, str]]:
    """The figures at the top of the page: (name, value)."""
    metrics, report = run.metrics, run.report
    losses = metrics.column("loss").known.y
    figures = [("steps", f"{metrics.last_step:,}" + (f" of {run.state.steps:,}" if run.state.steps else ""))]
    if len(losses):
        figures.append(("loss, first to last", f"{losses[0]:.4f} → {losses[-1]:.4f}"))
    if len(rewards := metrics.column("reward").known.y):
        figures.append(("reward, first to last", f"{rewards[0]:.4f} → {rewards[-1]:.4f}"))
    if (evals := metrics.evals.get("eval_loss")) is not None:
        steps, held_out = evals.known.x, evals.known.y
        lowest = int(held_out.argmin())
        figures.append(("held-out loss, last", f"{held_out[-1]:.4f}"))
        if lowest != len(held_out) - 1:
            figures.append(("held-out loss, lowest", f"{held_out[lowest]:.4f} at step {steps[lowest]:.0f}"))
    for name, line in curves.by_source(metrics).items():
        figures.append((f"held-out loss of {name}, last", f"{line.known.y[-1]:.4f}"))
    for name, seen in (str(run.verdict.get("rows")), run.verdict), ("base text", report.get("base_text") or {}):
        as_came = (seen.get("source") or {}).get("loss")
        source = "" if as_came in (None, seen.get("base")) else f", {as_came:.4f} of the source"
        if seen.get("adapter") is not None:
            figures.append((f"loss on {name}", f"{seen['adapter']:.4f} ({seen['base']:.4f} of the base{source})"))
        elif seen.get("text", "").startswith("not read"):
            figures.append((f"loss on {name}", seen["text"]))
    seconds, tokens = (float(np.nansum(metrics.steps[name])) for name in ("seconds", "tokens"))
    if seconds:
        figures += [("time of steps", duration(seconds)), ("tokens", f"{tokens:,.0f}")]
        figures.append(("tokens/s", f"{tokens / seconds:,.0f}"))
    if within := run.within:
        figures.append(("of the time given", f"{duration(within['spent_s'])} of {duration(within['within_s'])}"))
    if peak := report.get("peak_rss_bytes"):
        planned = (report.get("planned") or {}).get("peak_rss_bytes")
        figures.append(("peak memory", gb(peak) + (f" (at most {gb(planned)} planned)" if planned else "")))
    if run.adapter_step is not None:
        figures.append(("adapter is of step", f"{run.adapter_step:,}"))
    return figures


def summary(run: record.Record) -> list[str]:
    """What a reader must know before the curves, a sentence each."""
    state, sentences = run.state, list[str]()
    of = f" of {state.steps:,}" if state.steps else ""
    if state.name == "running":
        sentences.append(f"The run is going on: step {state.step:,}{of}, {state.why}.")
    elif state.name in ("stopped", "crashed", "not begun"):
        word = {"stopped": "was stopped", "crashed": "crashed"}.get(state.name, "never began")
        sentences.append(f"The run {word} at step {state.step:,}{of}: {state.why}.")
    elif measured := run.verdict:
        sentences.append(f"{measured['text'][0].upper()}{measured['text'][1:]}.")
    if run.report.get("stopped_early"):
        sentences.append(f"Stopped early at step {state.step:,}{of}: no better evaluation was seen.")
    elif state.ended:
        sentences.append(f"Its time was over at step {state.step:,}{of}.")
    sentences += [f"Resumed at step {step:,} on {when(at)}." for step, at in run.resumed]
    for step, downs in groupby(run.metrics.step_downs, key=lambda down: down[0]):
        hows, whys = zip(*(how.partition(": ")[::2] for _, how in downs), strict=True)
        why = f" ({whys[-1]})" if whys[-1] else ""
        sentences.append(f"Stepped down at step {step:,}: {', then '.join(hows)}{why}. What is learned stays the same.")
    missing = len(run.metrics.steps["loss"]) - len(run.metrics.column("loss").known)
    if missing > 0:
        sentences.append(f"{missing:,} steps have no number for their loss; they are gaps, marked ×.")
    if run.metrics.unread:
        sentences.append(f"Lines of metrics.jsonl that could not be read: {run.metrics.unread:,}.")
    return sentences


def gb(count: object) -> str:
    return f"{count / 1e9:.2f} GB" if isinstance(count, int | float) else ""


def beside(line: Document) -> str:
    """What was measured beside its plan, in words."""
    planned, measured = line["planned"], line["measured"]
    if not isinstance(planned, int | float) or not isinstance(measured, int | float) or not planned:
        return ""
    more = measured / planned - 1
    return "as planned" if abs(more) < 0.005 else f"{abs(more):.0%} {'more' if more > 0 else 'less'} than planned"


def number(value: object) -> str:
    """A number of a report: whole ones with commas, others with four digits."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return "" if value is None or isinstance(value, Undefined) else str(value)
    return f"{value:,}" if isinstance(value, int) else f"{value:.4g}"


def cut(text: object) -> str:
    """The text of a row or an answer, at most `MAX_TEXT` characters."""
    words = str(text)
    return words if len(words) <= MAX_TEXT else f"{words[:MAX_TEXT]} … ({len(words) - MAX_TEXT:,} more characters)"


def when(seconds: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M", time.localtime(seconds))


MOST = 30


def of_scores(scores: Document) -> list[Markup]:
    """Of a run's labels the confusion matrix, of at most `MOST` with the most rows, and how often it is right where it
    is so sure; none where no labels were scored."""
    side = (scores.get("sides") or {}).get("adapter") or {}
    names, pictures = [str(name) for name in scores.get("labels") or ()], list[Markup]()
    if confusion := side.get("confusion"):
        counts = np.array(confusion, float)
        some = np.sort(np.argsort(-counts.sum(1), kind="stable")[:MOST])
        few = [names[i] for i in some]
        cells = np.where(counts > 0, counts, np.nan)[np.ix_(some, some)]
        pictures.append(plots.heat_map("Rows by label (down) and prediction (across)", few, few, cells.tolist()))
    if bins := side.get("reliability"):
        sure = np.array([one["sure"] for one in bins])
        right = np.array([one["right"] for one in bins], float)
        curves = [plots.Curve("right", Series(sure, right), "eval"), plots.Curve("sure", Series(sure, sure), "plan")]
        pictures.append(plots.svg(plots.Chart("How often it is right", "share", "probability", curves, from_zero=True)))
    return pictures
