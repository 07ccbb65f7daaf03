//! The reference page (docs/verbs.md), made from the table. The test below holds that the page is what the
//! table says; `UPDATE_DOCS=1 cargo test --lib reference` writes it anew.

#[cfg(test)]
mod tests {
    use crate::api::fault::TABLE;
    use crate::api::table;
    use crate::api::verb::{Origin, Verb};
    use std::collections::BTreeMap;
    use std::fmt::Write;

    const PAGE: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/docs/verbs.md");

    fn cell(text: &str) -> String {
        text.replace('|', "\\|")
    }

    fn row(page: &mut String, verb: &Verb) {
        let params: Vec<String> = verb
            .params
            .iter()
            .map(|p| {
                let name = if p.optional {
                    format!("[{}: {}]", p.name, p.kind.as_str())
                } else {
                    format!("{}: {}", p.name, p.kind.as_str())
                };
                if p.help.is_empty() { name } else { format!("{name} ({})", p.help) }
            })
            .collect();
        let states: Vec<&str> = verb.states().iter().map(|s| s.as_str()).collect();
        let cells = [
            format!("`{}`", verb.name),
            cell(&params.join("; ")),
            verb.returns.to_owned(),
            verb.kind_name().to_owned(),
            format!("{:?}", verb.role).to_lowercase(),
            states.join(", "),
            cell(verb.help),
        ];
        writeln!(page, "| {} |", cells.join(" | ")).unwrap();
    }

    fn page() -> String {
        let mut page = String::from(
            "# Verbs and faults\n\nMade from the verb table; `system.methodHelp`, `verb_list` and `dom0ctl verb help` say the \
             same.\n\nKind: a *read* changes nothing; a *job* is a change, accepted durably and run under locks; a *signal* \
             acts on a job or an event at once. A job verb called directly waits for the job's end; `job_submit` does not.\n",
        );
        let mut families: BTreeMap<&str, Vec<Verb>> = BTreeMap::new();
        for verb in table().into_values() {
            families.entry(verb.family).or_default().push(verb);
        }
        for (family, verbs) in families {
            for (origin, title) in
                [(Origin::Dialect, "the Oracle VM Agent's verbs"), (Origin::Own, "own verbs")]
            {
                let mine: Vec<&Verb> = verbs.iter().filter(|v| v.origin == origin).collect();
                if mine.is_empty() {
                    continue;
                }
                writeln!(page, "\n## {family}: {title}\n").unwrap();
                page.push_str("| verb | parameters | answer | kind | role | VM states | what it does |\n|---|---|---|---|---|---|---|\n");
                for verb in mine {
                    row(&mut page, verb);
                }
            }
        }
        page.push_str("\n## Faults\n\nA fault of the Oracle VM Agent's verbs has code 1 and the same name and text behind the prefix its clients know.\n\n");
        page.push_str("| code | name | what it means |\n|---|---|---|\n");
        for (name, code, help) in TABLE {
            writeln!(page, "| {code} | `{name}` | {} |", cell(help)).unwrap();
        }
        page
    }

    #[test]
    fn the_reference_page_says_what_the_table_says() {
        let made = page();
        if std::env::var_os("UPDATE_DOCS").is_some() {
            std::fs::write(PAGE, &made).unwrap();
        }
        let kept = std::fs::read_to_string(PAGE).unwrap_or_default();
        assert!(
            kept == made,
            "docs/verbs.md is old; UPDATE_DOCS=1 cargo test --lib reference writes it anew"
        );
    }

    #[test]
    fn every_change_of_a_vm_tells_in_which_states_it_is_allowed() {
        for verb in table().values().filter(|v| v.family == "vm" && v.kind_name() == "job") {
            // It makes a VM that is not there.
            assert_eq!(verb.states().is_empty(), verb.name == "create_vm", "{}", verb.name);
        }
        for action in crate::vm::Action::ALL {
            let mut verbs = crate::api::vm::verbs_of(action).chain(crate::api::migration::verbs_of(action));
            assert!(verbs.next().is_some(), "{action:?}");
        }
    }

    #[test]
    fn every_verb_has_help_and_optional_parameters_come_last() {
        for verb in table().values() {
            assert!(!verb.help.is_empty(), "{}", verb.name);
            let first_optional = verb.params.iter().position(|p| p.optional).unwrap_or(verb.params.len());
            assert!(verb.params[first_optional..].iter().all(|p| p.optional), "{}", verb.name);
        }
    }
}
