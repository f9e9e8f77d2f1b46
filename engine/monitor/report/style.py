"""How the report looks: colours for light, dark and paper, on a phone and on a desk. One column of text, drawings side
by side where there is room.

Contrast of text is at least 4.5:1 and of lines at least 3:1 against their background, in both schemes.
"""

from __future__ import annotations

CSS = """
:root { color-scheme: light dark; --page: #ffffff; --ink: #1b1f24; --quiet: #57606a; --rule: #d7dce1; --soft: #f4f6f8;
  --s0: #1f5fbf; --s1: #8a3fb0; --s2: #1a7f4b; --s3: #b4540a; --warn: #b3261e; --worked: #1a7f4b; --input: #c9cfd6;
  --room: #d98a1f; }
@media (prefers-color-scheme: dark) { :root { --page: #14171a; --ink: #e6e9ec; --quiet: #9aa4ae; --rule: #333a41;
  --soft: #1d2125; --s0: #77aaf5; --s1: #c99ae6; --s2: #5cc98c; --s3: #f0a35c; --warn: #ff8a80; --worked: #3fae74;
  --input: #474f57; --room: #d9963a; } }
* { box-sizing: border-box; }
html { -webkit-text-size-adjust: 100%; }
body { margin: 0 auto; padding: 24px 16px 64px; max-width: 1120px; background: var(--page); color: var(--ink);
  font: 15px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif; }
h1 { margin: 0; font-size: 26px; line-height: 1.2; overflow-wrap: anywhere; }
h2 { margin: 44px 0 12px; padding-top: 12px; border-top: 1px solid var(--rule); font-size: 19px; line-height: 1.3; }
h3 { margin: 20px 0 6px; font-size: 15px; }
p { margin: 8px 0; max-width: 75ch; overflow-wrap: anywhere; }
.subtitle { margin: 6px 0 20px; color: var(--quiet); }
.warning { color: var(--warn); font-weight: 600; }
.figures { display: grid; grid-template-columns: repeat(auto-fill, minmax(158px, 1fr)); gap: 10px; margin: 14px 0; }
.figures div { padding: 10px 12px; border-radius: 8px; background: var(--soft); }
.figures dt { color: var(--quiet); font-size: 13px; }
.figures dd { margin: 2px 0 0; font-size: 19px; font-weight: 600; line-height: 1.25; overflow-wrap: anywhere;
  font-variant-numeric: tabular-nums; }
.figures dd.note { margin-top: 2px; color: var(--quiet); font-size: 13px; font-weight: 400; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; margin: 8px 0; font-variant-numeric: tabular-nums; }
caption { padding-bottom: 4px; text-align: left; font-weight: 600; }
th, td { padding: 5px 16px 5px 0; border-bottom: 1px solid var(--rule); text-align: left; vertical-align: top;
  white-space: pre-wrap; }
th { overflow-wrap: break-word; }
td { overflow-wrap: anywhere; }
th:last-child, td:last-child { padding-right: 0; }
thead th { color: var(--quiet); font-size: 13px; font-weight: 500; }
tbody th { font-weight: 500; }
.number { text-align: right; }
td.number, td.short { white-space: nowrap; }
pre { margin: 6px 0; padding: 10px 12px; border-radius: 8px; background: var(--soft); overflow-x: auto;
  white-space: pre-wrap; overflow-wrap: anywhere;
  font: 13px/1.5 ui-monospace, SFMono-Regular, Menlo, Consolas, monospace; }
details { margin: 8px 0; }
summary { color: var(--quiet); cursor: pointer; font-size: 13px; }
.curves { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 340px), 1fr)); gap: 24px 28px; }
figure { margin: 0; min-width: 0; }
figcaption { font-weight: 600; }
figcaption .unit { color: var(--quiet); font-weight: 400; }
.said { margin: 0 0 4px; color: var(--quiet); font-size: 13px; }
.legend { display: flex; flex-wrap: wrap; gap: 2px 16px; margin: 4px 0; padding: 0; color: var(--quiet);
  font-size: 13px; list-style: none; }
.legend svg { width: 26px; height: 10px; margin-right: 6px; vertical-align: middle; }
figure > svg { display: block; width: 100%; height: auto; max-width: 560px; }
svg text { fill: var(--quiet); font: 10.5px system-ui, -apple-system, "Segoe UI", Roboto, Arial, sans-serif;
  font-variant-numeric: tabular-nums; }
svg .end { text-anchor: end; }
svg .middle { text-anchor: middle; }
svg path { fill: none; vector-effect: non-scaling-stroke; }
svg .grid { stroke: var(--rule); }
svg .mark { stroke: var(--quiet); stroke-dasharray: 1 4; stroke-linecap: round; stroke-width: 2; }
svg .limit { stroke: var(--warn); stroke-dasharray: 10 4 2 4; stroke-width: 1.5; }
svg .line { stroke: var(--line); stroke-width: 1.8; stroke-linejoin: round; }
svg .band { fill: var(--line); opacity: .18; }
svg .dot { fill: var(--line); }
.s0 { --line: var(--s0); }
.s1 { --line: var(--s1); }
.s2 { --line: var(--s2); }
.s3 { --line: var(--s3); }
svg .line.s1 { stroke-dasharray: 6 3; }
svg .line.s2 { stroke-dasharray: 2 3; }
svg .line.s3 { stroke-dasharray: 9 3 2 3; }
.bars td.bar { width: 45%; min-width: 110px; padding-right: 16px; }
.bars svg { display: block; width: 100%; height: 14px; margin-top: 4px; }
svg .p0 { fill: var(--worked); }
svg .p1 { fill: var(--input); }
svg .p2 { fill: var(--room); }
svg .beyond { fill: var(--warn); }
svg .rest { fill: var(--soft); }
.bars .beyond { color: var(--warn); }
@media (max-width: 640px) {
  th, td { padding-right: 10px; }
  .bars, .bars tbody { display: block; width: 100%; }
  .bars thead { display: none; }
  .bars tr { display: flex; flex-wrap: wrap; border-bottom: 1px solid var(--rule); padding: 6px 0; }
  .bars th, .bars td, .bars td.bar { flex: 1 1 auto; padding: 0; border: 0; text-align: left; }
  .bars td.number { flex-basis: 0; }
  .bars th, .bars td.bar { flex-basis: 100%; }
  .bars td.number::before { display: block; color: var(--quiet); font-size: 13px; content: attr(data-name); }
}
.swatch { display: inline-block; width: 12px; height: 12px; margin-right: 6px; border-radius: 2px;
  vertical-align: -1px; }
.swatch.p0 { background: var(--worked); }
.swatch.p1 { background: var(--input); }
.swatch.p2 { background: var(--room); }
@media print {
  :root { --page: #ffffff; --ink: #000000; --quiet: #444444; --rule: #bbbbbb; --soft: #f3f3f3; --s0: #1f5fbf;
    --s1: #8a3fb0; --s2: #1a7f4b; --s3: #b4540a; --warn: #b3261e; --worked: #1a7f4b; --input: #c9cfd6;
    --room: #d98a1f; }
  body { max-width: none; padding: 0; font-size: 10.5pt; }
  h2 { break-after: avoid; }
  figure, tr, pre, .figures div { break-inside: avoid; }
  .figures div, pre { border: 1px solid var(--rule); }
  svg, .swatch { print-color-adjust: exact; -webkit-print-color-adjust: exact; }
  .curves { grid-template-columns: 1fr 1fr; }
}
"""
