"""The style sheet of the report; colours come from charts.VARIABLES."""

SHEET = """
*{box-sizing:border-box}
:root{color-scheme:light dark;--page:#f6f7f9}
@media (prefers-color-scheme:dark){:root{--page:#111418}}
body{margin:0;background:var(--page);color:var(--ink);
font:15px/1.55 system-ui,-apple-system,"Segoe UI",sans-serif}
main{max-width:1020px;margin:0 auto;padding:40px 24px 64px}
h1{font-size:28px;line-height:1.2;margin:0 0 4px}
h2{font-size:18px;margin:40px 0 12px}
h3{font-size:14px;margin:0 0 8px;font-weight:600}
p{margin:0 0 12px}
.muted{color:var(--muted)}
.claim{font-size:20px;line-height:1.4;margin:20px 0 0}
.claim b{color:var(--series-0);white-space:nowrap}
.card{background:var(--surface);border:1px solid var(--line);
border-radius:10px;padding:16px}
.grid{display:grid;gap:16px;
grid-template-columns:repeat(auto-fit,minmax(min(100%,400px),1fr))}
.card svg{display:block;width:100%;height:auto}
table{border-collapse:collapse;width:100%}
th,td{text-align:left;padding:7px 12px;border-bottom:1px solid var(--line);
vertical-align:top;overflow-wrap:anywhere}
tr:last-child>*{border-bottom:0}
thead th{color:var(--muted);font-weight:500;font-size:13px}
td.number,th.number{text-align:right;font-variant-numeric:tabular-nums;
white-space:nowrap}
.facts th{color:var(--muted);font-weight:500;width:11em}
.example{margin-bottom:16px}
.question{font-weight:500;margin-bottom:12px;white-space:pre-wrap}
.message{border-left:3px solid var(--line);padding:2px 0 2px 12px;
margin:0 0 10px}
.message.assistant{border-color:var(--series-0)}
.message.tool{border-color:var(--series-2)}
.role{font-size:12px;color:var(--muted)}
.text{white-space:pre-wrap;overflow-wrap:anywhere}
.text,pre{font-family:ui-monospace,"SF Mono",Menlo,Consolas,monospace;
font-size:13px}
.reward{font-size:13px;color:var(--muted);margin:0}
.reward b{color:var(--ink)}
pre{overflow-x:auto;margin:12px 0 0}
summary{cursor:pointer;font-weight:600}
details{margin-top:16px}
"""
