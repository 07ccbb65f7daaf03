//! Both halves of the codec together, and what strangers may send.

use super::{
    Answer, Encoded, Fault, Value, decode_call, decode_response, encode_call, encode_fault, encode_response,
    encode_value,
};
use crate::config;
use crate::wire::DecodeError;
use iso8601::{Date, DateTime, Time};
use proptest::prelude::*;
use std::collections::BTreeMap;

fn limits() -> config::Wire {
    config::Wire::default()
}

fn call_with(value: &str) -> String {
    format!(
        "<?xml version=\"1.0\"?><methodCall><methodName>echo</methodName><params><param>{value}</param></params></methodCall>"
    )
}

/// The one parameter that `value` is read as.
fn read(value: &str) -> Result<Value, DecodeError> {
    let (method, mut params) = decode_call(call_with(value).as_bytes(), &limits())?;
    assert_eq!((method.as_str(), params.len()), ("echo", 1));
    Ok(params.remove(0))
}

fn text(text: &str) -> Value {
    Value::String(text.to_owned())
}

fn members(members: &[(&str, Value)]) -> Value {
    Value::Struct(members.iter().map(|(name, value)| ((*name).to_owned(), value.clone())).collect())
}

#[test]
fn every_form_of_a_value_that_clients_send_is_read() {
    let date = |millisecond| {
        Value::DateTime(DateTime {
            date: Date::YMD { year: 1998, month: 7, day: 17 },
            time: Time { hour: 14, minute: 8, second: 55, millisecond, ..Time::default() },
        })
    };
    for (xml, value) in [
        ("<value/>", text("")),
        ("<value></value>", text("")),
        ("<value><string/></value>", text("")),
        ("<value><string></string></value>", text("")),
        ("<value>   </value>", text("   ")),
        ("<value><string>  </string></value>", text("  ")),
        ("<value>plain &lt;text&gt; &amp; &quot;&apos;&#65;&#x1F600;</value>", text("plain <text> & \"'A😀")),
        ("<value> untyped\n</value>", text(" untyped\n")),
        ("<value>\n  <string>typed</string>\n</value>", text("typed")),
        ("<value><string>a\r\nb\rc&#13;d</string></value>", text("a\nb\nc\rd")),
        ("<value><string><![CDATA[<i4>&amp;]]></string></value>", text("<i4>&amp;")),
        ("<value>a<![CDATA[b]]>c</value>", text("abc")),
        ("<value>a<!-- </value> -->b<?php x ?>c</value>", text("abc")),
        ("<value><i4>5</i4></value>", Value::Int(5)),
        ("<value><int> 5 </int></value>", Value::Int(5)),
        ("<value><int>+5</int></value>", Value::Int(5)),
        ("<value><int>-0007</int></value>", Value::Int(-7)),
        ("<value><int>2147483647</int></value>", Value::Int(i32::MAX)),
        ("<value><i4>-2147483648</i4></value>", Value::Int(i32::MIN)),
        ("<value><i8>9223372036854775807</i8></value>", Value::Int64(i64::MAX)),
        ("<value><i8>-9223372036854775808</i8></value>", Value::Int64(i64::MIN)),
        ("<value><ex:i8>1</ex:i8></value>", Value::Int64(1)),
        (
            "<value xmlns:ex=\"http://ws.apache.org/xmlrpc/namespaces/extensions\"><ex:nil/></value>",
            Value::Nil,
        ),
        ("<value><nil/></value>", Value::Nil),
        ("<value><nil></nil></value>", Value::Nil),
        ("<value><boolean>1</boolean></value>", Value::Bool(true)),
        ("<value><boolean>0</boolean></value>", Value::Bool(false)),
        ("<value><double>-1.5e3</double></value>", Value::Double(-1500.0)),
        ("<value><double>.5</double></value>", Value::Double(0.5)),
        ("<value><base64>aGVs\n  bG8=</base64></value>", Value::Base64(b"hello".to_vec())),
        ("<value><base64/></value>", Value::Base64(Vec::new())),
        ("<value><dateTime.iso8601>19980717T14:08:55</dateTime.iso8601></value>", date(0)),
        ("<value><dateTime.iso8601>19980717T14:08:55.005Z</dateTime.iso8601></value>", date(5)),
        ("<value><array/></value>", Value::Array(vec![])),
        ("<value><array><data/></array></value>", Value::Array(vec![])),
        ("<value> <array> <data> </data> </array> </value>", Value::Array(vec![])),
        (
            "<value><array><data><value>a</value><value/></data></array></value>",
            Value::Array(vec![text("a"), text("")]),
        ),
        ("<value><struct/></value>", members(&[])),
        (
            "<value><struct><member><name></name><value>a</value></member>\
             <member>\n<name>b</name>\n<value><struct/></value>\n</member></struct></value>",
            members(&[("", text("a")), ("b", members(&[]))]),
        ),
    ] {
        assert_eq!(read(xml).as_ref(), Ok(&value), "{xml}");
    }
}

#[test]
fn an_element_that_is_read_at_once_means_the_same_as_one_read_in_pieces() {
    let plain = [
        "<string>a b</string>",
        "<string></string>",
        "<string> ]]> \u{e9}\u{1F600} </string>",
        " \n<int> 5 </int> ",
        "<i4>7</i4>",
        "<i8>-9</i8>",
        "<ex:i8>9</ex:i8>",
        "<boolean>1</boolean>",
        "<double>-1.5e3</double>",
        "<base64>aGVs\nbG8=</base64>",
        "<dateTime.iso8601>20261122T01:02:03</dateTime.iso8601>",
        "<nil></nil>",
        "<int>x</int>",
        "<string>a</strin>",
        "<string>a</string >",
        "<string>a</string>b",
        "<string>a<b/></string>",
        "<unknown>a</unknown>",
        "<string>a",
        "<struct></struct>",
        "<array></array>",
        "<struct><member> <name>n</name> <value><string>v</string></value></member></struct>",
    ];
    let meaning = |value: &str| match read(value) {
        Ok(value) => Ok(value),
        Err(DecodeError::Malformed { problem, .. }) => Err(problem),
        Err(limit) => panic!("{limit}"),
    };
    for value in plain {
        // An attribute in each start tag: those are read by events.
        let mut pieces = value.to_owned();
        for tag in
            ["string", "int", "i4", "i8", "ex:i8", "boolean", "double", "base64", "nil", "name", "unknown"]
        {
            pieces = pieces.replace(&format!("<{tag}>"), &format!("<{tag} a='1'>"));
        }
        pieces = pieces.replace("<dateTime.iso8601>", "<dateTime.iso8601 a='1'>");
        assert_eq!(meaning(value), meaning(&pieces), "{value}");
    }
}

#[test]
fn what_is_no_value_is_refused_with_the_place_and_what_is_allowed() {
    for (xml, allowed) in [
        ("<value><i4>2147483648</i4></value>", "2147483647"),
        ("<value><int>-2147483649</int></value>", "2147483647"),
        ("<value><i8>9223372036854775808</i8></value>", "9223372036854775807"),
        ("<value><int></int></value>", "2147483647"),
        ("<value><int>1.0</int></value>", "2147483647"),
        ("<value><int>0x10</int></value>", "2147483647"),
        ("<value><int>1 2</int></value>", "2147483647"),
        ("<value><int>١</int></value>", "2147483647"),
        ("<value><boolean>true</boolean></value>", "0 or 1"),
        ("<value><boolean>2</boolean></value>", "0 or 1"),
        ("<value><double>NaN</double></value>", "decimal"),
        ("<value><double>inf</double></value>", "decimal"),
        ("<value><double>-Infinity</double></value>", "decimal"),
        ("<value><double>1e999</double></value>", "decimal"),
        ("<value><double></double></value>", "decimal"),
        ("<value><base64>a</base64></value>", "A-Z"),
        ("<value><base64>!!!!</base64></value>", "A-Z"),
        ("<value><dateTime.iso8601>2024-W05-1T00:00:00</dateTime.iso8601></value>", "YYYYMMDD"),
        ("<value><dateTime.iso8601>yesterday</dateTime.iso8601></value>", "YYYYMMDD"),
        ("<value><nil>x</nil></value>", "<nil/>"),
        ("<value><float>1</float></value>", "int i4 i8"),
        ("<value><INT>1</INT></value>", "int i4 i8"),
        ("<value><ex:int>1</ex:int></value>", "int i4 i8"),
        ("<value><value>1</value></value>", "int i4 i8"),
        ("<value>text<int>1</int></value>", "white space"),
        ("<value><int>1</int>text</value>", "white space"),
        ("<value><int>1</int><int>2</int></value>", "</value>"),
        ("<value><string>a<b/></string></value>", "text"),
        (
            "<value><struct><member><name>a</name><value/></member><member><name>a</name><value/></member></struct></value>",
            "once",
        ),
        ("<value><struct><member><value/><name>a</name></member></struct></value>", "<name>"),
        ("<value><struct><member><name>a</name></member></struct></value>", "<value>"),
        ("<value><struct><value/></struct></value>", "<member>"),
        ("<value><array><value/></array></value>", "<data>"),
        ("<value><array><data/><data/></array></value>", "</array>"),
        ("<value>&undeclared;</value>", "&amp;"),
        ("<value>&#0;</value>", "&amp;"),
        ("<value>&#1;</value>", "&amp;"),
        ("<value>&#xD800;</value>", "&amp;"),
        ("<value>&#xFFFE;</value>", "&amp;"),
        ("<value>&#x110000;</value>", "&amp;"),
        ("<value>&#99999999999999999999;</value>", "&amp;"),
        ("<value>a & b</value>", "well-formed"),
        ("<value>\u{1}</value>", "XML 1.0"),
        ("<value>\u{0}</value>", "XML 1.0"),
        ("<value>\u{FFFF}</value>", "XML 1.0"),
        ("<value><!-- \u{8} --></value>", "XML 1.0"),
        ("<value a=b>x</value>", "name="),
        ("<value a=\"1\" a=\"2\">x</value>", "name="),
        ("<value><?xml version=\"1.0\"?></value>", "very start"),
    ] {
        let error = read(xml).expect_err(xml).to_string();
        assert!(error.starts_with("byte ") && error.contains(allowed), "{xml}: {error}");
    }
}

#[test]
fn a_document_that_is_no_single_call_is_refused() {
    let call = call_with("<value/>");
    let long_name = format!("<methodCall><methodName>{}</methodName></methodCall>", "a".repeat(1 << 20));
    let no_param_end = call.replace("</param>", "");
    for (document, why) in [
        (String::new(), "empty"),
        ("   ".to_owned(), "blank"),
        ("hello".to_owned(), "text"),
        (format!("{call}{call}"), "two calls"),
        (
            format!("{}{}", call, call_with("<value/>").replace("<?xml version=\"1.0\"?>", "")),
            "two calls, one declaration",
        ),
        (format!("{call}garbage"), "trailing text"),
        (format!("{call}<x/>"), "trailing element"),
        (no_param_end, "missing </param>"),
        (call.replace("</methodCall>", ""), "missing end"),
        (call.replace("</params>", ""), "missing </params>"),
        (call.replace("<methodName>echo</methodName>", ""), "no name"),
        (call.replace("echo", ""), "empty name"),
        (call.replace("echo", "e cho"), "blank in the name"),
        (call.replace("echo", "echo\n&#10;x"), "newline in the name"),
        (call.replace("echo", "<b>echo</b>"), "element in the name"),
        (long_name, "name of 1 MB"),
        (call.replace("methodCall", "methodResponse"), "a response"),
        (call.replace("methodCall", "m:methodCall"), "a prefix"),
        (call.replace("?>", "?><!DOCTYPE methodCall>"), "DOCTYPE"),
        (call.replace("\"1.0\"", "\"1.0\" encoding=\"UTF-16\""), "declared UTF-16"),
        (call.replace("\"1.0\"", "\"1.0\" encoding=\"UTF-7\""), "declared UTF-7"),
        (call.replace("\"1.0\"", "\"1.0\" encoding=\"ISO-8859-1\""), "declared Latin-1"),
        (format!(" {call}"), "declaration not at the start"),
        (call.replace("<params>", "<params>x"), "text between elements"),
        (call.replace("<params>", "<params><![CDATA[ ]]>"), "CDATA between elements"),
        (call.replace("<value/>", "<value><string>never closed"), "unclosed"),
        (call.replace("<value/>", "<value><![CDATA[never closed"), "unclosed CDATA"),
        (call.replace("<value/>", "<value><!-- never closed"), "unclosed comment"),
        (call.replace("<param>", "<param><value/>"), "two values"),
        (call.replace("<value/>", ""), "no value"),
    ] {
        assert!(decode_call(document.as_bytes(), &limits()).is_err(), "{why}");
    }
    for (bytes, why) in [
        (&b"\xFF\xFE<\0m\0"[..], "UTF-16 with a mark"),
        (b"<\0m\0e\0t\0", "UTF-16 without a mark"),
        (b"<methodCall><methodName>a\xFF</methodName></methodCall>", "not UTF-8"),
        (b"<methodCall><methodName>\xED\xA0\x80</methodName></methodCall>", "a lone surrogate"),
        (b"<methodCall><methodName>a</methodName><!-- \xC0\x80 --></methodCall>", "an overlong form"),
    ] {
        assert!(decode_call(bytes, &limits()).is_err(), "{why}");
    }
}

#[test]
fn calls_as_clients_write_them_are_read() {
    let named = |document: &str| {
        decode_call(document.as_bytes(), &limits()).map(|(name, params)| (name, params.len()))
    };
    for (document, name, params) in [
        ("<methodCall><methodName>echo</methodName></methodCall>", "echo", 0),
        ("<methodCall><methodName> echo\n</methodName><params/></methodCall>", "echo", 0),
        (
            "<methodCall><methodName>system.listMethods</methodName><params></params></methodCall>\n\n",
            "system.listMethods",
            0,
        ),
        (
            "\u{FEFF}<?xml version='1.0' encoding='utf-8'?><methodCall><methodName>a_1:/b</methodName></methodCall>",
            "a_1:/b",
            0,
        ),
        (
            "<?xml version='1.0' encoding='UTF-8'?>\n<!-- hi --><methodCall xmlns:ex='urn:x'>\n<methodName>echo</methodName>\n<params>\n<param>\n<value>\n<int>1</int>\n</value>\n</param>\n</params>\n</methodCall><!-- bye --><?pi?>\n",
            "echo",
            1,
        ),
    ] {
        assert_eq!(named(document), Ok((name.to_owned(), params)), "{document}");
    }
}

#[test]
fn entity_bombs_are_refused_before_any_entity_is_read() {
    let lol = "<?xml version=\"1.0\"?><!DOCTYPE lolz [<!ENTITY lol \"lol\"><!ENTITY lol2 \"&lol;&lol;&lol;\">]>\
        <methodCall><methodName>&lol2;</methodName></methodCall>";
    let external = "<!DOCTYPE a SYSTEM \"http://127.0.0.1:1/x\" [<!ENTITY % p SYSTEM \"file:///etc/passwd\"> %p;]>\
        <methodCall><methodName>a</methodName></methodCall>";
    let quadratic = format!(
        "<!DOCTYPE a [<!ENTITY a \"{}\">]><methodCall><methodName>{}</methodName></methodCall>",
        "a".repeat(100_000),
        "&a;".repeat(100_000)
    );
    for document in [lol, external, &quadratic] {
        let error = decode_call(document.as_bytes(), &limits()).unwrap_err();
        assert!(error.to_string().contains("DOCTYPE"), "{error}");
    }
}

#[test]
fn depth_number_and_size_are_bounded() {
    let nested = |depth: usize| {
        read(&format!(
            "{}<value/>{}",
            "<value><array><data>".repeat(depth),
            "</data></array></value>".repeat(depth)
        ))
    };
    let structs = |depth: usize| {
        read(&format!(
            "{}<value/>{}",
            "<value><struct><member><name>n</name>".repeat(depth),
            "</member></struct></value>".repeat(depth)
        ))
    };
    let max = limits().max_depth;
    assert!(nested(max).is_ok() && structs(max).is_ok());
    for error in [nested(max + 1), structs(max + 1), nested(10_000), structs(10_000)] {
        assert!(matches!(error, Err(DecodeError::Limit { max: 32, .. })), "{error:?}");
    }

    let items = |count: usize| {
        read(&format!("<value><array><data>{}</data></array></value>", "<value/>".repeat(count)))
    };
    assert!(items(limits().max_values - 1).is_ok());
    assert!(matches!(items(limits().max_values), Err(DecodeError::Limit { .. })));

    let empty_members = format!("<value><struct>{}</struct></value>", "<member/>".repeat(1_000_000));
    let no_limit = config::Wire { max_body_bytes: usize::MAX, ..limits() };
    assert!(decode_call(call_with(&empty_members).as_bytes(), &no_limit).is_err());

    let ampersands = format!("<value>{}</value>", "&amp;".repeat(2_000_000));
    let (_, params) = decode_call(call_with(&ampersands).as_bytes(), &no_limit).unwrap();
    assert_eq!(params, [Value::String("&".repeat(2_000_000))]);

    for (less, fits) in [(0, true), (1, false)] {
        let document = call_with("<value>x</value>");
        let exact = config::Wire { max_body_bytes: document.len() - less, ..limits() };
        assert_eq!(decode_call(document.as_bytes(), &exact).is_ok(), fits);
    }
}

#[test]
fn an_error_never_repeats_the_body() {
    for secret_place in [
        "<value><int>hunter2</int></value>",
        "<value><hunter2/></value>",
        "<value>x</hunter2>",
        "<value>&hunter2;</value>",
        "<value hunter2></value>",
        "<value><base64>hunter2!</base64></value>",
    ] {
        let error = read(secret_place).unwrap_err();
        assert!(!format!("{error} {error:?}").contains("hunter2"), "{error:?}");
    }
}

#[test]
fn an_error_says_at_which_byte() {
    let document = call_with("<value><int>x</int></value>");
    let at = document.find("x</int>").unwrap() + "x</int>".len();
    let Err(DecodeError::Malformed { at: told, .. }) = decode_call(document.as_bytes(), &limits()) else {
        panic!("it was read");
    };
    assert_eq!(told, at);
}

#[test]
fn values_are_written_in_the_manner_of_the_dialect() {
    for (value, xml) in [
        (Value::Nil, "<value><nil/></value>"),
        (Value::Int(5), "<value><int>5</int></value>"),
        (Value::Int64(5), "<value><i8>5</i8></value>"),
        (Value::Bool(true), "<value><boolean>1</boolean></value>"),
        (text("a<b>&\"c\"\r\n"), "<value><string>a&lt;b&gt;&amp;\"c\"&#13;\n</string></value>"),
        (
            text("\u{0}\u{1b}\u{FFFE}é\u{FEFF}"),
            "<value><string>\u{FFFD}\u{FFFD}\u{FFFD}é\u{FEFF}</string></value>",
        ),
        (Value::Double(f64::NAN), "<value><nil/></value>"),
        (Value::Double(0.1), "<value><double>0.1</double></value>"),
        (
            members(&[("<", Value::Array(vec![Value::Nil]))]),
            "<value><struct><member><name>&lt;</name><value><array><data><value><nil/></value></data></array></value></member></struct></value>",
        ),
    ] {
        assert_eq!(std::str::from_utf8(&encode_value(&value).0).unwrap(), xml);
    }
}

#[test]
fn an_answer_of_encoded_pieces_reads_like_the_values_they_hold() {
    let long = text(&"long ".repeat(2000));
    let values: Vec<Value> =
        (0..1000).map(|n| if n % 3 == 0 { long.clone() } else { Value::Int(n) }).collect();
    let pieces: Vec<Encoded> = values.iter().map(encode_value).collect();
    let shared = pieces[0].0.as_ptr();
    let chunks = encode_response(&Answer::Array(pieces), usize::MAX).unwrap();
    assert!(chunks.iter().any(|chunk| chunk.as_ptr() == shared), "a long piece was copied");
    assert!(chunks.len() < 700, "short pieces were not joined: {}", chunks.len());
    let whole = chunks.concat();
    let no_limit = config::Wire { max_body_bytes: usize::MAX, ..limits() };
    assert_eq!(decode_response(&whole, &no_limit), Ok(Ok(Value::Array(values))));
}

#[test]
fn an_answer_is_measured_after_escaping() {
    let answer = Answer::Value(text(&"&".repeat(1000)));
    let size = encode_response(&answer, usize::MAX).unwrap().concat().len();
    assert!(size > 5000);
    assert!(encode_response(&answer, size).is_ok());
    assert_eq!(encode_response(&answer, size - 1).unwrap_err().max_bytes, size - 1);
    let answer = Answer::Array(vec![encode_value(&Value::Nil); 10]);
    let size = encode_response(&answer, usize::MAX).unwrap().concat().len();
    assert!(encode_response(&answer, size).is_ok());
    assert!(encode_response(&answer, size - 1).is_err());
}

#[test]
fn a_fault_comes_back_as_it_was() {
    let fault = Fault { fault_code: -7, fault_string: "exceptions.Exception:<bad> & \u{1}".to_owned() };
    let Ok(Err(read)) = decode_response(&encode_fault(&fault), &limits()) else {
        panic!("it was not read as a fault");
    };
    assert_eq!((read.fault_code, read.fault_string.as_str()), (-7, "exceptions.Exception:<bad> & \u{FFFD}"));
    let no_fault = "<methodResponse><fault><value>x</value></fault></methodResponse>";
    assert!(decode_response(no_fault.as_bytes(), &limits()).is_err());
}

/// Text that XML can hold, with what needs escaping more often than chance gives it.
fn xml_text() -> impl Strategy<Value = String> {
    prop_oneof!["[ -~\\t\\n\\r]{0,20}", "[&<>'\"\\r\\n\\]]{0,10}", any::<String>()].prop_map(|text| {
        text.chars().filter(|c| matches!(c, '\t' | '\n' | '\r' | ' '..='\u{FFFD}' | '\u{10000}'..)).collect()
    })
}

fn date() -> impl Strategy<Value = DateTime> {
    (0..=9999, 1..=12u32, 1..=28u32, 0..24u32, 0..60u32, 0..=60u32, 0..1000u32, -23..=23i32, 0..60i32)
        .prop_map(|(year, month, day, hour, minute, second, millisecond, hours, minutes)| DateTime {
            date: Date::YMD { year, month, day },
            time: Time {
                hour,
                minute,
                second,
                millisecond,
                tz_offset_hours: hours,
                tz_offset_minutes: if hours < 0 { -minutes } else { minutes },
            },
        })
}

fn value() -> impl Strategy<Value = Value> {
    let scalar = prop_oneof![
        any::<i32>().prop_map(Value::Int),
        any::<i64>().prop_map(Value::Int64),
        any::<bool>().prop_map(Value::Bool),
        xml_text().prop_map(Value::String),
        any::<f64>().prop_filter("has a form", |number| number.is_finite()).prop_map(Value::Double),
        date().prop_map(Value::DateTime),
        prop::collection::vec(any::<u8>(), 0..40).prop_map(Value::Base64),
        Just(Value::Nil),
    ];
    scalar.prop_recursive(6, 60, 8, |inner| {
        prop_oneof![
            prop::collection::vec(inner.clone(), 0..8).prop_map(Value::Array),
            prop::collection::btree_map(xml_text(), inner, 0..8)
                .prop_map(|members: BTreeMap<_, _>| Value::Struct(members)),
        ]
    })
}

proptest! {
    #[test]
    fn what_is_written_is_read_back(values in prop::collection::vec(value(), 0..5)) {
        let (method, params) = decode_call(&encode_call("echo", &values), &limits()).unwrap();
        prop_assert_eq!(method, "echo");
        prop_assert_eq!(&params, &values);
        for value in values {
            let answer = encode_response(&Answer::Value(value.clone()), usize::MAX).unwrap().concat();
            prop_assert_eq!(decode_response(&answer, &limits()), Ok(Ok(value)));
        }
    }

    #[test]
    fn what_is_written_is_legal_even_for_text_that_xml_cannot_hold(text in any::<Vec<char>>()) {
        let text: String = text.into_iter().collect();
        prop_assert!(decode_call(&encode_call("echo", &[Value::String(text)]), &limits()).is_ok());
    }

    #[test]
    fn random_bytes_never_panic(bytes in prop::collection::vec(any::<u8>(), 0..400)) {
        let _ = decode_call(&bytes, &limits());
        let _ = decode_response(&bytes, &limits());
    }

    #[test]
    fn damaged_documents_never_panic_and_cost_no_more_than_their_length(
        values in prop::collection::vec(value(), 0..4),
        edits in prop::collection::vec((any::<prop::sample::Index>(), 0..4u8, any::<u8>()), 1..8),
    ) {
        let mut document = encode_call("echo", &values).to_vec();
        for (at, kind, byte) in edits {
            if document.is_empty() {
                break;
            }
            let at = at.index(document.len());
            match kind {
                0 => document[at] = byte,
                1 => document.insert(at, b"<>&;/![]?-\"= \0"[usize::from(byte) % 14]),
                2 => { document.remove(at); }
                _ => { let piece = document[at..(at + 30).min(document.len())].to_vec(); document.splice(at..at, piece); }
            }
        }
        let _ = decode_response(&document, &limits());
        if let Ok((method, params)) = decode_call(&document, &limits()) {
            prop_assert!(method.len() + params.iter().map(weight).sum::<usize>() <= document.len());
        }
    }
}

/// Less than the shortest document that can hold the value.
fn weight(value: &Value) -> usize {
    8 + match value {
        Value::String(text) => text.len(),
        Value::Base64(data) => data.len(),
        Value::Array(items) => items.iter().map(weight).sum(),
        Value::Struct(members) => members.iter().map(|(name, value)| name.len() + weight(value)).sum(),
        _ => 0,
    }
}
