"use strict";
const tip = document.getElementById("tip");

function number(v, digits = 0) { // at least so many of them
  const far = Math.abs(v) >= 1e5 || (v !== 0 && Math.abs(v) < 1e-3);
  return far ? v.toExponential(Math.max(2, digits - 1)) : String(+v.toPrecision(Math.max(5, digits)));
}

function scale(svg) {
  const d = svg.dataset, n = (k) => Number(d[k]), log = d.log === "1";
  const low = log ? Math.log10(n("yl")) : n("yl"), high = log ? Math.log10(n("yh")) : n("yh");
  return {
    x: (px) => n("xl") + ((px - n("xs")) / (n("xe") - n("xs"))) * (n("xh") - n("xl")),
    y: (py) => { const v = low + ((py - n("ys")) / (n("ye") - n("ys"))) * (high - low); return log ? 10 ** v : v; },
    left: n("xs"), right: n("xe"), top: n("ye"), bottom: n("ys"), unit: d.unit,
  };
}

function nearest(path, px) {
  if (!path.points) path.points = [...path.getAttribute("d").matchAll(/[ML]([-\d.]+) ([-\d.]+)/g)].map((m) => [+m[1], +m[2]]);
  let best = null;
  for (const p of path.points) if (!best || Math.abs(p[0] - px) < Math.abs(best[0] - px)) best = p;
  return best;
}

function leave() {
  tip.hidden = true;
  for (const c of document.querySelectorAll(".cursor")) c.remove();
}

document.addEventListener("pointermove", (e) => {
  const svg = e.target.closest && e.target.closest("svg.chart[data-xl]");
  leave();
  if (!svg) return;
  const box = svg.getBoundingClientRect(), s = scale(svg);
  const px = ((e.clientX - box.left) / box.width) * svg.viewBox.baseVal.width;
  if (px < s.left - 4 || px > s.right + 4) return;
  const lines = [];
  let at = null;
  for (const path of svg.querySelectorAll("path[data-name]")) {
    const p = nearest(path, px);
    if (!p) continue;
    if (at === null) at = p[0];
    lines.push(path.dataset.name + ": " + number(s.y(p[1])));
  }
  if (at === null) return;
  const cursor = document.createElementNS("http://www.w3.org/2000/svg", "path");
  cursor.setAttribute("class", "cursor");
  cursor.setAttribute("d", "M" + at + " " + s.bottom + "V" + s.top);
  svg.append(cursor);
  tip.textContent = s.unit + " " + number(Math.round(s.x(at) * 100) / 100) + "\n" + lines.join("\n");
  tip.hidden = false;
  tip.style.left = Math.min(e.clientX + 14, innerWidth - tip.offsetWidth - 6) + "px";
  tip.style.top = Math.min(e.clientY + 14, innerHeight - tip.offsetHeight - 6) + "px";
});
document.addEventListener("pointerleave", leave);
