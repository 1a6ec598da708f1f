/** Elements of the page. All text goes in as text, so nothing from a model can become markup. */

type Child = Node | string | null | undefined;

/** Make an element with attributes and children. */
export function element<K extends keyof HTMLElementTagNameMap>(
  tag: K,
  attributes: Readonly<Record<string, string | number>> = {},
  ...children: Child[]
): HTMLElementTagNameMap[K] {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) if (value !== "") made.setAttribute(name, String(value));
  fill(made, ...children);
  return made;
}

/** Put children into an element, in the place of those that it has. */
export function fill(into: Element, ...children: Child[]): void {
  into.replaceChildren(...children.filter((child): child is Node | string => child !== null && child !== undefined));
}
