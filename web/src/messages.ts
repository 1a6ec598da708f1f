/** The words of the page, in the languages of the one table that it shares with the program. */

import table from "../../src/twofold/report/messages.json";

export type Key = keyof typeof table;
export type Language = "en" | "es";

export class Words {
  private readonly numbers: Map<string, Intl.NumberFormat> = new Map();

  constructor(readonly language: Language) {}

  /** The words of a key, with what stands in braces put in. */
  say(key: Key, values: Readonly<Record<string, string | number>> = {}): string {
    return table[key][this.language].replace(/\{(\w+)\}/g, (_, name: string) => String(values[name] ?? ""));
  }

  private format(options: Intl.NumberFormatOptions): Intl.NumberFormat {
    const key = JSON.stringify(options);
    const known = this.numbers.get(key) ?? new Intl.NumberFormat(this.language, options);
    this.numbers.set(key, known);
    return known;
  }

  percent(share: number, digits = 1): string {
    return this.format({ style: "percent", minimumFractionDigits: digits, maximumFractionDigits: digits }).format(share);
  }

  number(value: number, digits = 3): string {
    return this.format({ maximumSignificantDigits: digits }).format(value);
  }

  whole(value: number): string {
    return this.format({ maximumFractionDigits: 0 }).format(value);
  }

  millions(numbers: number): string {
    return `${this.format({ minimumFractionDigits: 1, maximumFractionDigits: 1 }).format(numbers / 1e6)} M`;
  }

  megabytes(bytes: number): string {
    return `${this.format({ minimumFractionDigits: 1, maximumFractionDigits: 1 }).format(bytes / 1e6)} MB`;
  }
}
