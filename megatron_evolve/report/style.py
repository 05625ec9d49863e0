"""The style: one sheet for screen and paper, light and dark. Fonts are the reader's own; nothing is fetched."""

STYLE = """
:root { color-scheme: light dark; --page:#f6f5f1; --card:#ffffff; --ink:#16161a; --soft:#4c4b47; --muted:#65635d;
  --rule:#dedcd3; --axis:#a9a69b; --dev:#1f68c1; --external:#c2500f; --rise:#2a78d6; --fall:#e34948; --from:#7767d2;
  --to:#2a1c76; --inside:#ffffff; --good:#0a6b2d; --good-wash:#dff1e3; --bad:#a51d1d; --bad-wash:#fbe3e1;
  --calm:#4c4b47; --calm-wash:#eeece5; --warm:#7a4a00; --warm-wash:#fbeccb; --wedge:#e3494818; --link:#1f5fae; }
@media (prefers-color-scheme: dark) {
  :root { --page:#121213; --card:#1b1b1d; --ink:#f1f0ec; --soft:#c6c4bc; --muted:#a3a098; --rule:#34343a;
    --axis:#6d6b66; --dev:#5c9ff0; --external:#f08a4a; --rise:#3987e5; --fall:#e66767; --from:#8578de; --to:#e4deff;
    --inside:#0b0b0b; --good:#7fd69a; --good-wash:#17361f; --bad:#ff9d96; --bad-wash:#43201f; --calm:#c6c4bc;
    --calm-wash:#2b2b2e; --warm:#f2c569; --warm-wash:#3d2f12; --wedge:#e6676722; --link:#82b4f2; }
}
* { box-sizing:border-box; }
html { -webkit-text-size-adjust:100%; text-size-adjust:100%; }
body { margin:0; background:var(--page); color:var(--ink); font:15px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,
  "Noto Sans","DejaVu Sans",sans-serif; print-color-adjust:exact; -webkit-print-color-adjust:exact; }
main, body > header, nav, footer { max-width:1180px; margin:0 auto; padding:0 24px; }
a { color:var(--link); }
h1 { font-size:30px; line-height:1.2; margin:2px 0 12px; letter-spacing:-.01em; overflow-wrap:anywhere; }
h2 { font-size:20px; line-height:1.3; margin:0 0 10px; }
h3 { font-size:16px; margin:20px 0 6px; }
h4 { font-size:14px; margin:0 0 4px; }
p { margin:0 0 10px; max-width:76ch; }
.kicker { text-transform:uppercase; letter-spacing:.09em; font-size:12px; color:var(--muted); margin:34px 0 0; }
.finding { font-size:19px; line-height:1.45; max-width:62ch; margin:0 0 18px; }
.lead { font-size:16.5px; }
.lead .range { font-size:inherit; }
.note, .muted { color:var(--muted); font-size:13.5px; }
.none { color:var(--muted); }
code { font:12.5px/1.4 ui-monospace,SFMono-Regular,Menlo,Consolas,"DejaVu Sans Mono",monospace; }
code.whole { overflow-wrap:anywhere; }
section { background:var(--card); border:1px solid var(--rule); border-radius:10px; padding:20px 22px;
  margin:0 0 18px; }
article + article, section > article:not(:first-of-type) { border-top:1px solid var(--rule); margin-top:22px;
  padding-top:4px; }
nav ul { list-style:none; display:flex; flex-wrap:wrap; gap:4px 18px; margin:0 0 18px; padding:0; font-size:14px; }
footer { color:var(--muted); font-size:13px; padding-bottom:40px; }
.facts { display:grid; grid-template-columns:repeat(auto-fit,minmax(150px,1fr)); gap:12px 22px; margin:0 0 20px;
  padding:14px 0; border-top:1px solid var(--rule); border-bottom:1px solid var(--rule); }
.facts dt { color:var(--muted); font-size:12.5px; }
.facts dd { margin:0; font-weight:600; }
.facts dd code { font-weight:400; }
.pair { display:grid; grid-template-columns:repeat(auto-fit,minmax(300px,1fr)); gap:8px 34px; }
.box h3 { margin-top:0; }
.box ul { margin:0; padding-left:20px; }
.box li { margin-bottom:6px; }
.scroll { overflow-x:auto; margin:0 0 10px; }
.scroll:focus-visible { outline:2px solid var(--link); outline-offset:2px; }
table { border-collapse:collapse; font-size:13.5px; font-variant-numeric:tabular-nums; }
caption { text-align:left; font-weight:600; padding:6px 0; color:var(--soft); }
th, td { text-align:left; vertical-align:top; padding:6px 14px 6px 0; border-bottom:1px solid var(--rule); }
thead th { color:var(--muted); font-weight:600; font-size:12.5px; vertical-align:bottom;
  border-bottom-color:var(--axis); }
tbody th { font-weight:400; }
.prose { min-width:300px; }
.number { text-align:right; white-space:nowrap; }
.effect, .score, .badge.mode { white-space:nowrap; }
.range { color:var(--muted); font-size:12.5px; }
.count { color:var(--muted); font-size:12px; white-space:nowrap; }
ul.changes, ul.plain { list-style:none; margin:0; padding:0; }
ul.changes li { white-space:normal; }
ul.plain li { white-space:nowrap; }
ul.plain.cited li { white-space:normal; }
ul.plain li + li, ul.changes li + li { margin-top:2px; }
.path { color:var(--soft); }
.changes { min-width:150px; }
.cited { min-width:230px; font-size:13px; color:var(--soft); }
.cited code { color:var(--muted); overflow-wrap:anywhere; }
.turn { font-weight:600; }
ul.verdicts, ul.premises { list-style:none; padding:0; margin:0 0 12px; }
ul.verdicts li, ul.premises li { margin:0 0 5px; max-width:96ch; }
.badge { display:inline-block; font-size:12px; line-height:1.5; font-weight:600; padding:0 8px; border-radius:10px;
  background:var(--calm-wash); color:var(--calm); white-space:nowrap; letter-spacing:0; vertical-align:1px; }
.badge.small { font-size:11.5px; padding:0 7px; }
h1 .badge { font-size:13.5px; vertical-align:5px; padding:1px 10px; }
.badge.alarm { background:var(--bad-wash); color:var(--bad); }
.badge.tracking, .badge.good, .badge.closed { background:var(--good-wash); color:var(--good); }
.badge.ended, .badge.running, .badge.preparing { background:var(--warm-wash); color:var(--warm); }
mark { background:var(--warm-wash); color:var(--warm); font-weight:600; border-radius:4px; padding:0 4px; }
details { margin:0 0 8px; }
summary { cursor:pointer; color:var(--link); font-size:14px; padding:2px 0; }
.chain { list-style:none; margin:0 0 14px; padding:0; display:grid;
  grid-template-columns:repeat(auto-fill,minmax(195px,1fr)); gap:12px; }
.chain ul.plain li { white-space:normal; }
.chain > li { border:1px solid var(--rule); border-radius:8px; padding:10px 12px; font-size:13.5px; color:var(--soft);
  }
.chain b { color:var(--ink); }
svg { display:block; height:auto; min-width:560px; max-width:100%; }
svg text { font:12.5px system-ui,-apple-system,"Segoe UI",Roboto,"Noto Sans","DejaVu Sans",sans-serif;
  fill:var(--muted); }
svg .middle { text-anchor:middle; }
svg .end { text-anchor:end; }
svg .axis { fill:var(--soft); }
svg .strong { fill:var(--ink); font-weight:600; }
svg .series { fill:var(--ink); }
svg .alarm { fill:var(--bad); font-weight:600; }
svg .series, svg .quadrant { paint-order:stroke; stroke:var(--card); stroke-width:3px; stroke-linejoin:round; }
svg .quadrant { fill:var(--muted); font-style:italic; }
.grid { stroke:var(--rule); stroke-width:1; }
.zero { stroke:var(--axis); stroke-width:1.25; }
.line, .bar, .arm, .slope { fill:none; }
.line { stroke-width:2; }
.bar { stroke-width:1.5; opacity:.65; }
.line.dev, .bar.dev { stroke:var(--dev); }
.line.external, .bar.external { stroke:var(--external); }
.bar.final { stroke:var(--ink); stroke-width:2; opacity:1; }
.dot.final { fill:var(--ink); }
.dot { stroke:var(--card); stroke-width:1.5; }
.dot.dev { fill:var(--dev); }
.dot.external { fill:var(--external); }
.ring { fill:var(--card); stroke-width:2; }
.ring.dev { stroke:var(--dev); }
.ring.external { stroke:var(--external); }
.arm { stroke:color-mix(in oklab,var(--to) var(--shade),var(--from)); stroke-width:1.25; opacity:.38; }
.round { fill:color-mix(in oklab,var(--to) var(--shade),var(--from)); stroke:var(--card); stroke-width:1.5; }
svg .inside { fill:var(--inside); font-size:10.5px; font-weight:700; text-anchor:middle; }
.slope { stroke:var(--soft); stroke-width:1.5; }
.slope.beta { stroke-dasharray:6 4; }
figure { margin:0 0 14px; display:flex; flex-wrap:wrap; gap:6px 34px; align-items:flex-start; }
figure > .scroll { flex:0 1 auto; min-width:0; }
figcaption { flex:1 1 240px; max-width:76ch; }
figcaption h3 { margin-top:4px; }
.wedge { fill:var(--wedge); }
.legend { list-style:none; display:flex; flex-wrap:wrap; gap:2px 18px; margin:0 0 8px; padding:0; font-size:13.5px;
  color:var(--soft); }
.swatch { display:inline-block; width:11px; height:11px; border-radius:50%; margin-right:6px; border:2px solid;
  vertical-align:-1px; }
.swatch.dev { border-color:var(--dev); }
.swatch.external { border-color:var(--external); }
.swatch.dot.dev { background:var(--dev); }
.swatch.dot.external { background:var(--external); }
table.heat { border-collapse:separate; border-spacing:0 2px; }
.heat th, .heat td { border:0; padding:3px 9px; text-align:right; white-space:nowrap; }
.heat tbody th, .heat thead tr:first-child th { text-align:left; }
.heat td.none { background:none; }
.heat .first { border-left:6px solid var(--card); }
.heat td[colspan] { text-align:left; }
.heat .group { padding-top:12px; color:var(--muted); font-size:12.5px; font-weight:600; }
.heat td { color:var(--ink); }
.heat td.none { color:var(--muted); }
.key { font-size:13px; color:var(--muted); }
.key span { padding:2px 10px; color:var(--ink); font-variant-numeric:tabular-nums; }
@media (max-width:640px) {
  main, body > header, nav, footer { padding:0 12px; }
  section { padding:16px 14px; border-radius:8px; }
  h1 { font-size:25px; }
  .finding { font-size:17px; }
  h1 .badge { vertical-align:3px; }
}
@media print {
  :root { color-scheme:light; --page:#fff; --card:#fff; --ink:#000; }
  body { font-size:10.5pt; }
  nav { display:none; }
  main, body > header, footer { max-width:none; padding:0; }
  section { border:0; padding:0; margin:0 0 16pt; }
  .scroll { overflow:visible; }
  table { font-size:8.2pt; }
  th, td { padding-right:8px; }
  tr, figure, .chain > li, svg { break-inside:avoid; }
  h2, h3, caption { break-after:avoid; }
  details::details-content { content-visibility:visible; display:block; height:auto; }
}
"""
