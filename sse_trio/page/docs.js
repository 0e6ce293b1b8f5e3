// Renders openapi.json: operations, their parameters and answers, and the events of the stream. Text only.

const answer = await fetch("openapi.json");
const api = await answer.json();
const main = document.getElementById("operations");

function add(parent, name, text) {
  const element = document.createElement(name);
  if (text !== undefined) element.textContent = text;
  parent.append(element);
  return element;
}

function rows(parent, title, entries) {
  if (entries.length === 0) return;
  add(parent, "h3", title);
  const table = add(parent, "table");
  for (const [name, text] of entries) {
    const row = add(table, "tr");
    add(row, "th", name).scope = "row";
    add(row, "td", text);
  }
}

for (const [path, operations] of Object.entries(api.paths)) {
  for (const [method, operation] of Object.entries(operations)) {
    const section = add(main, "section");
    add(section, "h2", `${method.toUpperCase()} ${path}`);
    add(section, "p", operation.summary);
    rows(section, "Parameters", (operation.parameters ?? []).map((parameter) => [
      parameter.name + (parameter.required ? " *" : ""), parameter.description ?? "",
    ]));
    rows(section, "Answers", Object.entries(operation.responses).map(([status, { description }]) => [status, description]));
  }
}

const section = add(main, "section");
add(section, "h2", "Events of the stream");
for (const { $ref: reference } of api.components.schemas.Event.oneOf) {
  const schema = api.components.schemas[reference.split("/").at(-1)];
  add(section, "h3", schema.properties.event.const);
  add(section, "p", schema.description);
  add(section, "pre", JSON.stringify(schema.properties.data.contentSchema, null, 2));
}
main.removeAttribute("aria-busy");
