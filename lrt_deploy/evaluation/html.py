"""A parity report as one HTML page that opens offline: no script, no font, no picture from elsewhere.

Written from the JSON fields of a report, so that a stored one can be shown again and several can stand side by side.
Readable from 360 pixels on: charts stand one below the other there, and rows of the wide table become cards.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from html import escape
from typing import Any

from .svg_charts import Curve, curves, heat_map

BLUE, ORANGE, GREY = "#0072b2", "#d55e00", "#777777"

_STYLE = """
:root{color-scheme:light;--ink:#1d2430;--soft:#5b6472;--line:#dfe3e8;--good:#14683c;--bad:#a31621}
*{box-sizing:border-box}
body{margin:0;background:#f5f6f8;color:var(--ink);font:16px/1.5 system-ui,-apple-system,"Segoe UI",sans-serif}
main{max-width:1120px;margin:0 auto;padding:20px 16px 48px}
h1{font-size:1.35rem;margin:0 0 12px}h2{font-size:1.05rem;margin:0 0 4px}
p{margin:0 0 8px}.soft{color:var(--soft);font-size:.87rem}
.verdict{border-left:6px solid;border-radius:6px;padding:12px 16px;margin:0 0 16px;background:#fff}
.verdict p{overflow-wrap:anywhere}
.pass{border-color:var(--good)}.fail{border-color:var(--bad)}
.verdict b{font-size:1.15rem}.pass b{color:var(--good)}.fail b{color:var(--bad)}
.grid{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,440px),1fr));gap:16px}
section{background:#fff;border:1px solid var(--line);border-radius:8px;padding:14px 16px;min-width:0}
.wide{grid-column:1/-1}
svg{display:block;width:100%;height:auto;margin-top:6px}
.tick{font-size:12px;fill:var(--soft)}.axis{font-size:12.5px;fill:var(--soft)}
line.grid{stroke:var(--line);stroke-width:1}
.curve{fill:none;stroke-width:1.7;stroke-linejoin:round;stroke-linecap:round}
.limit{stroke:var(--bad);stroke-width:1.2;stroke-dasharray:2 3}
.divider{stroke:#9aa3af;stroke-width:1;stroke-dasharray:4 4}
.key{display:flex;flex-wrap:wrap;gap:2px 14px;font-size:.85rem;color:var(--soft)}
.key i{display:inline-block;width:18px;border-top:3px solid;vertical-align:middle;margin-right:6px}
.key i.dashed{border-top-style:dashed}
dl{display:grid;grid-template-columns:minmax(0,auto) minmax(0,1fr);gap:3px 16px;margin:6px 0 0}
dt{color:var(--soft)}dd{margin:0;overflow-wrap:anywhere;font-variant-numeric:tabular-nums}
table{width:100%;border-collapse:collapse;margin-top:6px;font-variant-numeric:tabular-nums}
th,td{text-align:right;padding:5px 8px;border-bottom:1px solid var(--line);overflow-wrap:anywhere}
th:first-child,td:first-child{text-align:left}th{font-weight:600;color:var(--soft);font-size:.87rem}
tr.here td:first-child{font-weight:700}tr.off td{color:var(--bad);font-weight:600}
@media(max-width:640px){main{padding:14px 10px 32px}section{padding:12px}
table.cards thead{display:none}table.cards tr{display:block;padding:6px 0;border-bottom:1px solid var(--line)}
table.cards td{display:flex;justify-content:space-between;gap:12px;border:0;padding:1px 0}
table.cards td::before{content:attr(data-name);color:var(--soft)}
table.cards td:first-child{font-weight:700}table.cards td:first-child::before{content:none}}
"""


def page(title: str, report: Mapping[str, Any], others: Sequence[Mapping[str, Any]] = ()) -> str:
    """The page of `report`, the JSON fields of a parity run; `others` are runs to stand beside it, itself included."""
    ran = bool(report["positions"]["position"])
    parts = [
        _verdict(report),
        '<div class="grid">',
        _parts(report),
        *([_facts(report), _errors(report), _kl(report), _layers(report)] if ran else []),
        _side_by_side(report, others) if ran else "",
        _bisection(report),
        _provenance(report),
        "</div>",
    ]
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        f"<title>{escape(title)}</title><style>{_STYLE}</style></head>"
        f"<body><main><h1>{escape(title)}</h1>{''.join(parts)}</main></body></html>\n"
    )


def _verdict(report: Mapping[str, Any]) -> str:
    word, _, rest = str(report["verdict"]).partition(" ")
    kind = "pass" if report["passed"] else "fail"
    where = (report.get("bisect") or {}).get("line")
    place = f'<p class="soft">{escape(where)}</p>' if where else ""
    return f'<div class="verdict {kind}"><p><b>{escape(word.rstrip(":"))}</b> {escape(rest)}</p>{place}</div>'


def _parts(report: Mapping[str, Any]) -> str:
    """The parts of the verdict, each with its own line; none in a page of an older report."""
    rows = []
    for name in ("weights", "arithmetic", "quality"):
        part = report.get(name)
        if not part:
            continue
        word, line = "PASS" if part["passed"] else "FAIL", str(part["line"]).removeprefix(f"{name}: ")
        rows.append(f"<dt>{name}: {word}</dt><dd>{escape(line)}</dd>")
    if not rows:
        return ""
    return f'<section class="wide"><h2>Parts of the verdict</h2><dl>{"".join(rows)}</dl></section>'


def _provenance(report: Mapping[str, Any]) -> str:
    """What it takes to make the report again; prompt and tokens as they were read."""
    found = report.get("provenance")
    if not found:
        return ""
    rows = "".join(f"<dt>{escape(name)}</dt><dd>{escape(value)}</dd>" for name, value in _flat(found))
    return f'<section class="wide"><h2>Provenance</h2><dl>{rows}</dl></section>'


def _flat(fields: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """One line for each group of fields."""
    for name, value in fields.items():
        if isinstance(value, Mapping):
            parts = (f"{key} {_words(item)}" for key, item in value.items() if item is not None)
            yield name, "; ".join(parts)
        else:
            yield name, _words(value)


def _words(value: object) -> str:
    return " ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)


def _facts(report: Mapping[str, Any]) -> str:
    divergence, prefill = report.get("first_divergence"), report.get("prefill") or {}
    parts = "none"
    if divergence:
        tie = "a near tie" if divergence["near_tie"] else "not a tie"
        parts = f"step {divergence['step']}, margin {number(divergence['margin'])}: {tie}"
    free, drift = report.get("free_running") or {}, report.get("drift") or {}
    facts = {
        "backend, precision": f"{report['backend']}, {report['precision']}",
        "rollout": f"{report['prompt_tokens']} prompt tokens, {report['steps']} greedy steps",
        "logits, largest error": number(report["max_abs_logit_error"]),
        "latent, largest error": number(report["max_abs_latent_error"]),
        "K and V, largest error": f"{number(report['max_abs_key_error'])}, {number(report['max_abs_value_error'])}",
        "KL, mean and largest": f"{number(report['mean_kl'])}, {number(report['max_kl'])}",
        "same first choice": f"{report['top1_agreement']:.2%} of positions",
        "tokens part": parts,
        "free-running": f"{free.get('token_agreement') or 0:.2%} of tokens equal (reported, not judged)",
        "drift of the latent": f"× {number(drift['growth'])} from first to last quarter" if drift else "no memory",
        "prefill": f"{prefill.get('policy')}, {number(prefill.get('passes'))} passes",
        "checkpoint": {True: "the one exported", False: "another file", None: "unknown"}[report["checkpoint_matches"]],
    }
    rows = "".join(f"<dt>{escape(name)}</dt><dd>{escape(value)}</dd>" for name, value in facts.items())
    return f"<section><h2>In numbers</h2><dl>{rows}</dl></section>"


def _errors(report: Mapping[str, Any]) -> str:
    positions = report["positions"]
    lines = [Curve("logits", positions["logit_error"], ORANGE)]
    if any(value is not None for value in positions["latent_error"]):
        lines.append(Curve("latent, teacher-forced", positions["latent_error"], BLUE))
        lines += _free(report, "latent_error", "latent, free-running")
    bounded = report["limits"].get("top1_agreement") is None
    limit = report["limits"]["max_abs_logit_error"] if bounded else None
    note = "Largest absolute difference at each position" + (", with the limit of the logits." if limit else ".")
    return _chart("Drift", note, lines, limit, report)


def _kl(report: Mapping[str, Any]) -> str:
    lines = [Curve("KL, teacher-forced", report["positions"]["kl"], BLUE), *_free(report, "kl", "KL, free-running")]
    lines.append(Curve("margin of the reference's first choice", report["positions"]["margin"], GREY, dashed=True))
    note = "Nats between the next-token distributions, and by how much the reference prefers its first token."
    return _chart("KL by position", note, lines, None, report)


def _free(report: Mapping[str, Any], column: str, label: str) -> list[Curve]:
    """The free run from where it parts."""
    divergence, free = report.get("first_divergence"), report.get("free_running")
    if not divergence or not free:
        return []
    begins = divergence["position"]
    return [Curve(label, free["positions"][column][begins:], ORANGE if column == "kl" else "#8a4fa8", True, begins)]


def _chart(title: str, note: str, lines: Sequence[Curve], limit: float | None, report: Mapping[str, Any]) -> str:
    divider = report["prompt_tokens"]
    key = "".join(
        f'<span><i class="{"dashed" if line.dashed else ""}" style="border-color:{line.colour}"></i>'
        f"{escape(line.label)}</span>"
        for line in lines
    )
    note = f"{note} The dashed upright line is where the prompt ends."
    picture = curves(lines, limit, divider, title)
    return f'<section><h2>{title}</h2><p class="soft">{escape(note)}</p><div class="key">{key}</div>{picture}</section>'


def _layers(report: Mapping[str, Any]) -> str:
    """K above V of each layer, over positions."""
    rows, names = [], []
    for layer in range(len((report["positions"]["key_errors"] or [[]])[0])):
        for letter, column in (("K", "key_errors"), ("V", "value_errors")):
            rows.append([errors[layer] for errors in report["positions"][column]])
            names.append(f"{letter} {layer}")
    if not rows:
        return ""
    picture, meaning = heat_map(rows, names, "error of K and V by layer and position")
    note = f"Largest absolute difference of each cache entry; {meaning}."
    return f'<section><h2>Cache, layer by layer</h2><p class="soft">{escape(note)}</p>{picture}</section>'


def _side_by_side(report: Mapping[str, Any], others: Sequence[Mapping[str, Any]]) -> str:
    if len(others) < 2:
        return ""
    rows = []
    for other in others:
        cells = _comparison(other)
        here = ' class="here"' if other["precision"] == report["precision"] else ""
        inner = "".join(f'<td data-name="{escape(name)}">{escape(value)}</td>' for name, value in cells.items())
        rows.append(f"<tr{here}>{inner}</tr>")
    head = "".join(f"<th>{escape(name)}</th>" for name in _comparison(others[0]))
    return (
        '<section class="wide"><h2>Precisions side by side</h2><p class="soft">The same prompt and steps, against the '
        f'same reference.</p><table class="cards"><thead><tr>{head}</tr></thead><tbody>{"".join(rows)}</tbody>'
        "</table></section>"
    )


def _comparison(report: Mapping[str, Any]) -> dict[str, str]:
    divergence, free = report.get("first_divergence"), report.get("free_running") or {}
    return {
        "precision": f"{report['precision']} ({report['backend']})",
        "verdict": "PASS" if report["passed"] else "FAIL",
        "mean KL": number(report["mean_kl"]),
        "largest KL": number(report["max_kl"]),
        "same first choice": f"{report['top1_agreement']:.1%}",
        "first divergence": "none" if not divergence else f"step {divergence['step']}",
        "free-running": f"{free.get('token_agreement') or 0:.1%}",
        "latent error": number(report["max_abs_latent_error"]),
    }


def _bisection(report: Mapping[str, Any]) -> str:
    found = report.get("bisect") or {}
    if not found.get("stages"):
        return ""
    rows = "".join(_stage_rows(found))
    return (
        f'<section class="wide"><h2>One step, stage by stage</h2><p class="soft">At position {found["position"]}, both '
        "sides from the reference's state; errors as a share of the largest number of each stage.</p>"
        f"<table><thead><tr><th>stage</th><th>error</th><th>largest number</th></tr></thead><tbody>{rows}</tbody>"
        "</table></section>"
    )


def _stage_rows(found: Mapping[str, Any]) -> Iterator[str]:
    """Around the fault where there is one: what comes long after it is off anyway."""
    stages = found["stages"]
    names = [stage["name"] for stage in stages]
    at = names.index(found["tensor"]) if found["tensor"] in names else None
    shown = stages if at is None else stages[max(0, at - 12) : at + 6]
    for stage in shown:
        off = ' class="off"' if stage["name"] == found["tensor"] else ""
        cells = f"<td>{escape(stage['name'])}</td><td>{number(stage['error'])}</td><td>{number(stage['scale'])}</td>"
        yield f"<tr{off}>{cells}</tr>"


def number(value: float | None) -> str:
    """In few digits; what is not finite says so."""
    if value is None:
        return "none"
    return f"{value:.3g}" if 1e-3 <= abs(value) < 1e5 or value == 0 else f"{value:.1e}"
