"""The style sheet of report.html: light and dark by the reader's preference, light on paper."""

CSS = """
:root{color-scheme:light dark;--page:#f6f5f2;--card:#fff;--ink:#1b1d21;--muted:#5d636d;--grid:#dcdad4;
--a:#0b61a8;--b:#c2520a;--c:#0a7a5b;--d:#a0468a;--e:#7a6200;
--sans:system-ui,-apple-system,'Segoe UI',Roboto,'DejaVu Sans',sans-serif;
--mono:ui-monospace,SFMono-Regular,Menlo,Consolas,'DejaVu Sans Mono',monospace}
@media screen and (prefers-color-scheme:dark){:root{--page:#121417;--card:#1b1e23;--ink:#eceef1;
--muted:#a0a7b2;--grid:#353a42;--a:#6cb4f5;--b:#ff9d57;--c:#46cda2;--d:#e29bd0;--e:#e0c14a}}
*{box-sizing:border-box}
body{margin:0;background:var(--page);color:var(--ink);font:15px/1.55 var(--sans)}
main{max-width:1080px;margin:0 auto;padding:40px 20px 64px}
h1{font-size:30px;line-height:1.2;margin:0;letter-spacing:-.01em;overflow-wrap:anywhere}
h2{font-size:19px;margin:44px 0 12px}h3{font-size:14.5px;margin:0;font-weight:600}p{margin:6px 0 0}
.muted,figcaption,footer{color:var(--muted)}footer{margin-top:40px;font-size:12.5px}
figcaption{font-size:12.5px;line-height:1.45;margin-top:6px}
.alert{border-left:4px solid var(--b);background:var(--card);padding:10px 14px;margin-top:16px}
.grid{display:grid;grid-template-columns:repeat(6,1fr);gap:14px}.tiles+.grid{margin-top:14px}
.s6{grid-column:span 6}.s3{grid-column:span 3}.s2{grid-column:span 2}
.card{background:var(--card);border:1px solid var(--grid);border-radius:10px;padding:16px 18px}
.card{margin:0;min-width:0}
.card svg{display:block;width:100%;height:auto;margin-top:6px}
.key{float:right;width:340px;max-width:60%;margin-top:-14px}.key+svg{clear:both}
.hero{display:grid;grid-template-columns:minmax(220px,1fr) 2fr;gap:28px;align-items:center;margin-top:24px}
.big{font-size:52px;font-weight:650;line-height:1.05;letter-spacing:-.02em;color:var(--a)}
.bars{display:grid;grid-template-columns:max-content 1fr max-content;gap:7px 12px;align-items:center}
.bars{font-size:13.5px}.bars b{font-weight:600}.bars small{color:var(--muted);margin-left:8px}
.bar{height:16px;border-radius:3px;background:var(--muted);opacity:.45}.bar.own{background:var(--a);opacity:1}
.tiles{display:flex;flex-wrap:wrap;gap:1px;margin-top:14px;padding:0;overflow:hidden;background:var(--grid)}
.tiles div{flex:1 1 150px;background:var(--card);padding:13px 18px}
.tiles dd{margin:0;font-size:20px;font-weight:600}
.tiles dt,.tiles small{color:var(--muted);font-size:12.5px;font-weight:400}.tiles small{display:block}
.big,.bars b,.tiles dd{font-variant-numeric:tabular-nums}
.answers{display:grid;grid-template-columns:repeat(auto-fill,minmax(158px,1fr));gap:12px;margin-top:12px}
.answer{display:flex;flex-direction:column;align-items:center;gap:6px;padding:12px;text-align:center}
.answer.wrong{border:2px dashed var(--b);padding:11px}.answer.wrong b{color:var(--b)}
.answer small{color:var(--muted);font-size:12.5px;overflow-wrap:anywhere}.answer figcaption{margin:0}
.answer figcaption,.said{max-width:100%;white-space:pre-line;overflow-wrap:anywhere}
.said{font:600 17px/1.3 var(--mono);margin-top:auto}
.items{display:flex;flex-wrap:wrap;justify-content:center;gap:8px;max-width:100%}
.items span{display:flex;flex-direction:column;align-items:center;max-width:100%}
.items img{display:block;border-radius:4px;max-width:100%;height:auto;image-rendering:pixelated}
.card svg.wave{width:110px;height:auto;margin:0;fill:var(--a)}
pre{font:13px/1.5 var(--mono);white-space:pre-wrap;overflow-wrap:anywhere;margin:0}
.settings{columns:2 400px;column-gap:14px}.settings section{break-inside:avoid;margin-bottom:14px}
table{border-collapse:collapse;width:100%;font-size:12.5px;margin-top:8px}
td{padding:3px 10px 3px 0;border-top:1px solid var(--grid);vertical-align:top}td:first-child{width:44%}
td:nth-child(2){font-family:var(--mono);overflow-wrap:anywhere}
td:nth-child(3){white-space:nowrap;color:var(--muted);text-align:right;padding-right:0}
.set td:nth-child(2){color:var(--a);font-weight:600}
@media screen and (max-width:760px){.s3,.s2{grid-column:span 6}.hero{grid-template-columns:1fr}
.bars small{display:block;margin:0}.s6{overflow-x:auto}.s6>svg{min-width:620px}}
@media print{@page{margin:14mm}body{background:#fff;font-size:12px}main{max-width:none;padding:0}
.answers{grid-template-columns:repeat(6,1fr)}.card,.alert,tr{break-inside:avoid}h2,h3{break-after:avoid}*{print-color-adjust:exact}}
"""
