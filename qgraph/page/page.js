"use strict";

// Tables: a click (or Enter) on a heading sorts by it; numbers by data-v, what has none comes last.
for (const table of document.querySelectorAll("table.sortable")) {
  const body = table.tBodies[0];
  const original = [...body.rows];
  const key = (row, column) => {
    const cell = row.cells[column];
    const value = cell.dataset.v;
    return value === undefined ? cell.textContent.trim() : value === "" ? null : Number(value);
  };
  const compare = (a, b) => (typeof a === "number" ? a - b : a.localeCompare(b, "en", { numeric: true }));
  table.tHead.addEventListener("click", (event) => {
    const button = event.target.closest("button");
    if (!button) return;
    const heading = button.closest("th");
    const next = { none: "ascending", ascending: "descending", descending: "none" };
    const order = next[heading.getAttribute("aria-sort") || "none"];
    for (const other of table.tHead.rows[0].cells) if (other.hasAttribute("aria-sort")) other.setAttribute("aria-sort", "none");
    heading.setAttribute("aria-sort", order);
    if (order === "none") return body.append(...original);
    const sign = order === "ascending" ? 1 : -1;
    const keyed = original.map((row) => [key(row, heading.cellIndex), row]);
    const isEmpty = (value) => value === null || value === "";
    keyed.sort(([a], [b]) => isEmpty(a) - isEmpty(b) || (isEmpty(a) ? 0 : sign * compare(a, b)));
    body.append(...keyed.map(([, row]) => row));
  });
}

// The ledger: a search over all its text, and a choice by how a weight is stored.
for (const tools of document.querySelectorAll("form.tools")) {
  const rows = [...document.getElementById(tools.dataset.table).tBodies[0].rows];
  const texts = rows.map((row) => row.textContent.toLowerCase());
  const [search, choice, told] = [tools.querySelector("input"), tools.querySelector("select"), tools.querySelector("output")];
  const filter = () => {
    const words = search.value.toLowerCase().split(/\s+/).filter(Boolean);
    let count = 0;
    rows.forEach((row, i) => {
      const fits = words.every((word) => texts[i].includes(word)) && (!choice.value || row.dataset.kind === choice.value);
      row.hidden = !fits;
      count += fits;
    });
    told.textContent = `${count} of ${rows.length} shown`;
  };
  tools.addEventListener("input", filter);
  tools.addEventListener("submit", (event) => event.preventDefault());
  tools.hidden = false;
  filter();
}

// Plots: what is under the pointer, or chosen with the arrow keys, is told below; a click or Enter finds it in the ledger.
for (const plot of document.querySelectorAll("svg.pointed")) {
  const marks = [...plot.querySelectorAll(".mark")];
  const told = plot.closest("figure").querySelector("output");
  let at = -1;
  const show = (index) => {
    if (at >= 0) marks[at].classList.remove("on");
    at = index;
    if (at < 0) return;
    marks[at].classList.add("on");
    told.textContent = marks[at].querySelector("title").textContent;
  };
  const jump = () => {
    const row = at >= 0 && document.getElementById(marks[at].dataset.row);
    if (!row) return;
    document.querySelector("tr.on")?.classList.remove("on");
    row.hidden = false;
    row.classList.add("on");
    row.scrollIntoView({ block: "center" });
  };
  plot.addEventListener("pointerover", (event) => {
    const mark = event.target.closest(".mark");
    if (mark) show(marks.indexOf(mark));
  });
  plot.addEventListener("click", jump);
  plot.addEventListener("keydown", (event) => {
    const step = { ArrowLeft: -1, ArrowRight: 1, Home: -marks.length, End: marks.length }[event.key];
    if (event.key === "Enter") jump();
    if (step === undefined) return;
    event.preventDefault();
    show(Math.min(Math.max(at + step, 0), marks.length - 1));
  });
}

// On paper everything is open.
addEventListener("beforeprint", () => document.querySelectorAll("details").forEach((each) => (each.open = true)));
