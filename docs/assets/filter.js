// A field above long tables, and one above the sections of a page that has pairs of snippets. It
// shows only the rows or sections that contain each of its words.
const fieldFor = (items, what, afterwards = () => {}) => {
  const field = document.createElement("input");
  field.className = "table-filter";
  field.type = "search";
  field.placeholder = `Search these ${items.length} ${what}`;
  field.setAttribute("aria-label", field.placeholder);
  field.addEventListener("input", () => {
    const words = field.value.toLowerCase().split(/\s+/);
    for (const elements of items) {
      const text = elements.map((element) => element.textContent).join(" ").toLowerCase();
      const hidden = !words.every((word) => text.includes(word));
      for (const element of elements) element.hidden = hidden;
    }
    afterwards();
  });
  return field;
};

// Hides tables without a visible row, and their headings.
const hideEmpty = (tables) => {
  for (const table of tables) {
    const hidden = !table.querySelector("tbody tr:not([hidden])");
    const box = table.closest(".md-typeset__scrollwrap") || table;
    box.hidden = hidden;
    let heading = box.previousElementSibling;
    if (heading && heading.matches(".table-filter")) heading = heading.previousElementSibling;
    if (heading && heading.matches("h2")) heading.hidden = hidden;
  }
};

document.addEventListener("DOMContentLoaded", () => {
  // Tables with the same heads are one list, such as the features of Accelerate by section.
  const lists = new Map();
  for (const table of document.querySelectorAll(".md-typeset table")) {
    const heads = [...table.querySelectorAll("th")].map((head) => head.textContent).join("|");
    lists.set(heads, [...(lists.get(heads) || []), table]);
  }
  for (const [heads, tables] of lists) {
    const rows = tables.flatMap((table) => [...table.querySelectorAll("tbody tr")]);
    if (heads === "|Accelerate|state|reason") for (const table of tables) table.dataset.features = "";
    if (rows.length < 12) continue;
    const first = tables[0].closest(".md-typeset__scrollwrap") || tables[0];
    const field = fieldFor(rows.map((row) => [row]), "rows", () => hideEmpty(tables));
    if (tables.length > 1 && first.previousElementSibling.matches("h2")) first.previousElementSibling.before(field);
    else first.before(field);
  }

  const sections = [...document.querySelectorAll(".pair")].map((pair) => {
    const elements = [];
    for (let last = pair; last; last = last.previousElementSibling) {
      elements.unshift(last);
      if (last.matches("h3")) break;
    }
    for (let next = pair.nextElementSibling; next && !next.matches("h2, h3"); next = next.nextElementSibling) {
      elements.push(next);
    }
    return elements;
  });
  if (sections.length > 4) sections[0][0].before(fieldFor(sections, "features"));
});
