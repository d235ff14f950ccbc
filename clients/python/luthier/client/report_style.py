"""The look of the HTML report: one style sheet, no fonts or images from elsewhere."""

STYLE = """
:root { --ink: #1c2230; --soft: #5c6675; --line: #dfe3ea; --paper: #ffffff; --back: #f5f6f9; --accent:
#2f5fd0;
  --second: #d9730d; --good: #18794e; --good-back: #e6f6ee; --bad: #c0352b; --bad-back: #fdecea; --mid:
  #8a6100; --mid-back: #fff4d6; }
* { box-sizing: border-box; }
body { margin: 0; background: var(--back); color: var(--ink); overflow-wrap: break-word;
  font: 15px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif; }
main { max-width: 1080px; margin: 0 auto; padding: 40px 24px 64px; } header p { margin: 4px 0; color:
var(--soft); } h1 { font-size: 28px; line-height: 1.2; margin: 0 0 6px; letter-spacing: -0.01em; } h2 {
font-size: 18px; margin: 0 0 14px; } h3 { font-size: 14px; margin: 22px 0 8px; color: var(--soft);
font-weight: 600; } section { background: var(--paper); border: 1px solid var(--line); border-radius: 12px;
padding: 24px; margin-top: 20px; } .headline { border-left: 5px solid var(--mid); font-size: 17px; }
.headline.better { border-left-color: var(--good); } .headline.worse { border-left-color: var(--bad); }
.headline strong { font-variant-numeric: tabular-nums; } .headline small { display: block; color: var(--soft);
font-size: 13px; margin-top: 4px; } .wide { overflow-x: auto; } table { border-collapse: collapse; width:
100%; } th, td { text-align: left; padding: 7px 12px 7px 0; border-bottom: 1px solid var(--line);
vertical-align: top; } th { font-size: 12px; color: var(--soft); font-weight: 600; white-space: nowrap; }
td.number, th.number { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; } td small
{ color: var(--soft); } tr:last-child > * { border-bottom: 0; }
.facts th { width: 9.5em; white-space: normal; } code, pre { font: 13px/1.45 ui-monospace,
SFMono-Regular, Menlo, Consolas, "Liberation Mono", monospace; } td code { overflow-wrap: anywhere; } .badge {
display: inline-block; border-radius: 99px; padding: 1px 10px; font-size: 12px; font-weight: 600;
  white-space: nowrap; color: var(--mid); background: var(--mid-back); }
.badge.better { color: var(--good); background: var(--good-back); } .badge.worse { color: var(--bad);
background: var(--bad-back); } svg { display: block; width: 100%; height: auto; } svg text { font: 12px
system-ui, -apple-system, "Segoe UI", Roboto, Arial, sans-serif; fill: var(--soft); } svg text.label { fill:
var(--ink); font-weight: 600; } .grid-line { stroke: var(--line); } .train { stroke: var(--accent); fill:
none; stroke-width: 2; } .train-raw { stroke: var(--accent); fill: none; stroke-width: 1; opacity: 0.3; }
.validation { stroke: var(--second); fill: none; stroke-width: 2; } .validation-dot { fill: var(--second); }
.whisker { stroke: var(--accent); stroke-width: 2.5; stroke-linecap: round; } .estimate { fill: var(--accent);
stroke: var(--paper); stroke-width: 2; } .prediction { border-top: 1px solid var(--line); padding: 16px 0;
break-inside: avoid; } .prediction:first-of-type { border-top: 0; padding-top: 0; } .question { color:
var(--soft); white-space: pre-wrap; margin: 0 0 10px; overflow-wrap: anywhere; } .question b { color:
var(--ink); font-weight: 600; } .answers { display: grid; gap: 10px; grid-template-columns: repeat(auto-fit,
minmax(215px, 1fr)); } .answer { border: 1px solid var(--line); border-radius: 8px; padding: 10px 12px;
background: var(--back); min-width: 0; } .answer.right { background: var(--good-back); border-color: #b7e2cc;
} .answer.wrong { background: var(--bad-back); border-color: #f4c7c3; } .answer h3 { margin: 0 0 6px;
font-size: 12px; color: var(--ink); display: flex; justify-content: space-between; gap: 8px; }
.answer.right h3 span { color: var(--good); } .answer.wrong h3 span { color: var(--bad); }
.answer pre { margin: 0; white-space: pre-wrap;
overflow-wrap: anywhere; } .columns { display: grid; gap: 8px 32px; grid-template-columns: repeat(auto-fit,
minmax(min(320px, 100%), 1fr)); } .columns > * { min-width: 0; } footer { color: var(--soft);
font-size: 13px; margin-top: 24px; }
.filter { display: flex; flex-wrap: wrap; gap: 8px 20px; align-items: center; margin: 0 0 16px; color: var(--soft); }
.filter[hidden], .prediction[hidden] { display: none; }
.filter input, .filter select { font: inherit; color: var(--ink); background: var(--paper); max-width: 100%;
  border: 1px solid var(--soft); border-radius: 6px; padding: 4px 8px; }
@media (max-width: 640px) {
  main { padding: 20px 10px 40px; }
  h1 { font-size: 22px; }
  section { padding: 16px 12px; }
  /* Letters of a picture that shrinks with the window could not be read. */
  .wide svg { min-width: 620px; }
}
@media print {
  body { background: #fff; font-size: 11px; }
  main { max-width: none; padding: 0; }
  section { border: 0; border-radius: 0; padding: 12px 0; margin-top: 8px; break-inside: auto; }
  .headline { border-left: 5px solid var(--mid); padding-left: 12px; }
  h2, h3 { break-after: avoid; }
  .answers { grid-template-columns: repeat(4, 1fr); }
  .filter { display: none; }
  * { -webkit-print-color-adjust: exact; print-color-adjust: exact; }
}
"""
