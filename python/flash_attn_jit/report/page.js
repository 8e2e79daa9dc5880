"use strict";
// What a cell sorts by: a number where it begins with one, and what is not known always last.
const valueOf = (row, column) => {
  const text = row.cells[column].textContent.trim();
  const number = Number.parseFloat(text.replace("−", "-").replace(/,/g, ""));
  return Number.isNaN(number) || /[a-z]\d|^\d+ ?[a-z]+,/.test(text) ? text : number;
};
const compare = (a, b) => {
  const unknown = (value) => value === "–" || value === "";
  if (unknown(a) || unknown(b)) return unknown(a) - unknown(b);
  return typeof a === "number" && typeof b === "number" ? a - b : String(a).localeCompare(String(b), "en", {numeric: true});
};
const sortBy = (table, column, header) => {
  const falls = header.getAttribute("aria-sort") !== "descending";
  for (const other of table.tHead.rows[0].cells) other.removeAttribute("aria-sort");
  header.setAttribute("aria-sort", falls ? "descending" : "ascending");
  const body = table.tBodies[0];
  const keyed = Array.from(body.rows, (row) => ({row, value: valueOf(row, column)}));
  keyed.sort((a, b) => {
    const unknownLast = compare(a.value, "–") === 0 || compare(b.value, "–") === 0;
    return falls && !unknownLast ? compare(b.value, a.value) : compare(a.value, b.value);
  });
  body.append(...keyed.map(({row}) => row));
};
for (const table of document.querySelectorAll("table.sorts"))
  for (const [column, header] of Array.from(table.tHead.rows[0].cells).entries()) {
    const button = document.createElement("button");
    button.type = "button";
    button.append(...header.childNodes);
    button.addEventListener("click", () => sortBy(table, column, header));
    header.append(button);
  }
for (const form of document.querySelectorAll("form[data-filters]")) {
  const rows = Array.from(document.getElementById(form.dataset.filters).tBodies[0].rows, (row) => {
    const link = row.querySelector("a[href^='#']");
    return {row, text: row.textContent.toLowerCase(), card: link && document.getElementById(link.hash.slice(1))};
  });
  const output = form.querySelector("output");
  const filter = () => {
    const words = Array.from(new FormData(form).values()).join(" ").toLowerCase().split(/\s+/).filter(Boolean);
    let shown = 0;
    for (const {row, text, card} of rows) {
      row.hidden = !words.every((word) => text.includes(word));
      if (card) card.hidden = row.hidden;
      shown += !row.hidden;
    }
    output.textContent = `${shown} of ${rows.length} shown`;
  };
  let waiting = 0;
  form.addEventListener("input", () => {
    clearTimeout(waiting);
    waiting = setTimeout(filter, 120);
  });
  form.addEventListener("submit", (event) => {
    event.preventDefault();
    filter();
  });
  form.hidden = false;
  filter();
}
