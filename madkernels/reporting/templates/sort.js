// A click on a column's name sorts by it: numbers from the largest down first, names from A on.
const text = (row, at) => row.cells[at].textContent.trim();
const value = (row, at) => parseFloat(text(row, at).replaceAll(",", ""));
const order = (at, down) => (one, other) => {
  if (at === 0) return text(one, 0).localeCompare(text(other, 0)) * (down ? -1 : 1);
  const [a, b] = [value(one, at), value(other, at)];
  return isNaN(a) || isNaN(b) ? isNaN(a) - isNaN(b) : (a - b) * (down ? -1 : 1);
};
for (const head of document.querySelectorAll("thead th")) {
  const button = document.createElement("button");
  button.append(...head.childNodes);
  head.append(button);
  button.onclick = () => {
    const body = head.closest("table").tBodies[0], sorted = head.ariaSort;
    const down = sorted ? sorted === "ascending" : head.cellIndex > 0;
    for (const other of head.parentNode.cells) other.ariaSort = null;
    head.ariaSort = down ? "descending" : "ascending";
    body.append(...[...body.rows].sort(order(head.cellIndex, down)));
  };
}
